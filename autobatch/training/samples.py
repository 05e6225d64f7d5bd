"""Batches of chosen samples, and in another precision: what a comparison runs on besides the batch as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["as_double", "take_samples", "tensors_of"]


def take_samples(batch: Any, indices: Sequence[int]) -> Any:
    """Make a batch of these samples, in this order, of the forms that `split_batch` takes; copies tensors.

    Args:
        batch: tensors of shape (samples, …), or tuples, lists and mappings of such; lists of other things are of samples.
        indices: the samples, of which any may come several times.
    """

    def pick(value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            return value if value.dim() == 0 else value[list(indices)]
        return [value[index] for index in indices]

    return _mapped(batch, pick, lists_too=True)


def as_double(batch: Any) -> Any:
    """Turn every tensor of real floating point numbers into float64."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return _mapped(batch, cast, lists_too=False)


def tensors_of(batch: Any, path: str = "batch") -> Iterator[tuple[str, tuple[object, ...], torch.Tensor]]:
    """Yield every tensor of a batch: how it is written, the keys that lead to it, and itself."""
    for keys, tensor in _walk(batch, ()):
        yield path + "".join(f"[{key!r}]" for key in keys), keys, tensor


def _walk(value: Any, keys: tuple[object, ...]) -> Iterator[tuple[tuple[object, ...], torch.Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*keys, key))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for index, item in enumerate(value):
            yield from _walk(item, (*keys, index))


def _mapped(batch: Any, change: Callable[[Any], Any], *, lists_too: bool) -> Any:
    import torch

    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        parts = {key: _mapped(value, change, lists_too=lists_too) for key, value in batch.items()}
        return parts if type(batch) is dict else type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        if not any(True for _ in _walk(batch, ())):
            return change(batch) if lists_too else batch
        items = [_mapped(item, change, lists_too=lists_too) for item in batch]
        if hasattr(batch, "_fields"):  # a named tuple
            return type(batch)(*items)
        return tuple(items) if isinstance(batch, tuple) else items
    return batch
