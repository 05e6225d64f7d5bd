"""Batches of any shape that loaders give, cut into micro-batches along their first dimension."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["batch_size", "split_batch"]


def batch_size(batch: object) -> int:
    """Count the samples of a batch: the length of the first dimension that all its tensors share.

    Args:
        batch: a tensor of shape (samples, …), or tuples, lists and mappings of such; a list of other things counts its
            items. Numbers, texts and None within it are passed over: they belong to every sample.

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


def _sizes(batch: object) -> Iterator[int]:
    if _is_tensor(batch):
        if batch.dim() == 0:  # type: ignore[attr-defined]
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
    import torch

    return isinstance(value, torch.Tensor)


def _cut(batch: Any, rows: Sequence[slice]) -> list[Any]:
    """One batch for each range of rows; a tree is walked once, however many they are."""
    if _is_tensor(batch):
        return [batch if batch.dim() == 0 else batch[part] for part in rows]
    if isinstance(batch, Mapping):
        values = zip(*(_cut(value, rows) for value in batch.values()), strict=True)
        parts = [dict(zip(batch, cut, strict=True)) for cut in values] or [{} for _ in rows]
        # A tokenizer's batch is a mapping with methods of its own: its class is kept where it takes one mapping.
        return parts if type(batch) is dict else [type(batch)(part) for part in parts]  # type: ignore[call-arg]
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        if not any(_has_tensor(item) for item in batch):
            return [batch[part] for part in rows]
        items = zip(*(_cut(item, rows) for item in batch), strict=True)
        if hasattr(batch, "_fields"):  # a named tuple
            return [type(batch)(*cut) for cut in items]
        return list(items) if isinstance(batch, tuple) else [list(cut) for cut in items]
    return [batch] * len(rows)
