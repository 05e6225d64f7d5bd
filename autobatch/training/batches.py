"""Batches of any shape that loaders give, cut into micro-batches along their first dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

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
    pieces, start = [], 0
    for size in sizes:
        pieces.append(_cut(batch, start, start + size))
        start += size
    return pieces


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


def _cut(batch: Any, start: int, stop: int) -> Any:
    if _is_tensor(batch):
        tensor: torch.Tensor = batch
        return tensor if tensor.dim() == 0 else tensor[start:stop]
    if isinstance(batch, Mapping):
        parts = {key: _cut(value, start, stop) for key, value in batch.items()}
        # A tokenizer's batch is a mapping with methods of its own: its class is kept where it takes one mapping.
        return parts if type(batch) is dict else type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        if not any(_has_tensor(item) for item in batch):
            return batch[start:stop]
        items = [_cut(item, start, stop) for item in batch]
        if hasattr(batch, "_fields"):  # a named tuple
            return type(batch)(*items)
        return tuple(items) if isinstance(batch, tuple) else items
    return batch
