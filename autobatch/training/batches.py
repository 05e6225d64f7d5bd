"""Batches of any shape that loaders give, cut into micro-batches along their first dimension."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


__all__ = ["batch_size", "split_batch", "tensors_of"]


def batch_size(batch: object) -> int:
    """Count the samples of a batch: the length of the first dimension that all its tensors share.

    Args:
        batch: a tensor or array of shape (samples, …), or tuples, lists and mappings of such; a list of other things counts
            its items. Numbers, texts and None within it are passed over: they belong to every sample. A list of tensors is
            taken as a loader's `default_collate` makes it, a tensor for each part of a sample: for one of a tensor for each
            sample give `split` and `size` functions.

    Raises:
        UsageError: there is nothing to count, or its parts differ.
    """
    sizes = set(_sizes(batch))
    if len(sizes) == 1:
        return sizes.pop()
    if not sizes:
        raise UsageError(
            f"a batch of type {type(batch).__name__} has no tensor to count samples by: give `split` and `size` functions"
        )
    raise UsageError(
        f"the parts of a batch have {', '.join(map(str, sorted(sizes)))} samples: all need the same first dimension; give "
        "`split` and `size` functions for batches of another form"
    )


def split_batch(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut a batch into micro-batches of these sizes, in order, without copying tensors.

    Args:
        batch: as `batch_size` takes it.
        sizes: samples of each micro-batch; their sum is the batch's size.

    Returns:
        One batch of the same form for each size.
    """
    ends = list(itertools.accumulate(sizes))
    return _cut(batch, [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)])


def tensors_of(batch: object) -> Iterator[torch.Tensor]:
    """Every tensor of a batch."""
    import torch

    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        for item in batch:
            yield from tensors_of(item)


def _sizes(batch: object) -> Iterator[int]:
    if _is_tensor(batch):
        if batch.ndim == 0:  # type: ignore[attr-defined]
            return
        yield int(batch.shape[0])  # type: ignore[attr-defined]
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        if any(_has_tensor(item) for item in batch):
            for item in batch:
                yield from _sizes(item)
        else:
            yield len(batch)


def _has_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensor(item) for item in value.values())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return any(_has_tensor(item) for item in value)
    return _is_tensor(value)


def _is_tensor(value: object) -> bool:
    """Tell a tensor of torch, or an array of numpy."""
    import torch

    numpy = sys.modules.get("numpy")
    return isinstance(value, torch.Tensor) or (numpy is not None and isinstance(value, numpy.ndarray))


def _cut(batch: Any, rows: Sequence[slice]) -> list[Any]:
    """One batch for each range of rows; a tree is walked once, however many they are."""
    if _is_tensor(batch):
        return [batch if batch.ndim == 0 else batch[part] for part in rows]
    if isinstance(batch, Mapping):
        values = zip(*(_cut(value, rows) for value in batch.values()), strict=True)
        parts = [dict(zip(batch, cut, strict=True)) for cut in values] or [{} for _ in rows]
        return parts if type(batch) is dict else [_like(batch, part) for part in parts]
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        if not any(_has_tensor(item) for item in batch):
            return [batch[part] for part in rows]
        items = zip(*(_cut(item, rows) for item in batch), strict=True)
        if hasattr(batch, "_fields"):  # a named tuple
            return [type(batch)(*cut) for cut in items]
        return list(items) if isinstance(batch, tuple) else [list(cut) for cut in items]
    return [batch] * len(rows)


def _like(batch: Mapping[Any, Any], part: dict[Any, Any]) -> Any:
    """A mapping of the batch's class, which may have methods of its own as a tokenizer's has."""
    if not isinstance(batch, MutableMapping):
        return type(batch)(part)  # type: ignore[call-arg]
    made = copy.copy(batch)
    made.update(part)
    return made
