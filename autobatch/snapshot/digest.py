"""A SHA-256 over values and tensor memory that depends on neither addresses nor hash seeds."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Digest"]


class Digest:
    """Collects tokens, each with its length before it, so that no two sequences read the same."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, *tokens: str | bytes | int) -> None:
        """Append tokens in order."""
        for token in tokens:
            data = token if isinstance(token, bytes) else str(token).encode()
            self._sha.update(b"%s %d:" % (type(token).__name__.encode(), len(data)))
            self._sha.update(data)

    def add_memory(self, tensor: torch.Tensor) -> None:
        """Append a tensor's type, shape, strides, device and every byte of its values, of any dtype."""
        self.add("tensor", str(tensor.dtype), str(tuple(tensor.shape)), str(tensor.stride()), str(tensor.device))
        host = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if host.nbytes:
            # Read in place: numpy has no bfloat16, and torch runs without numpy.
            self._sha.update((ctypes.c_char * host.nbytes).from_address(host.data_ptr()))

    def add_value(self, value: object) -> None:
        """Append a tree of containers, tensors and plain values.

        An object of which only its kind can be told (a function, a logger) counts by its type's name.
        """
        import torch

        if isinstance(value, torch.Tensor):
            self.add_memory(value)
        elif isinstance(value, Mapping):
            self.add("mapping", len(value))
            for key, item in value.items():
                self.add_value(key)
                self.add_value(item)
        elif isinstance(value, (list, tuple)):
            self.add("sequence", len(value))
            for item in value:
                self.add_value(item)
        else:
            self.add(type(value).__qualname__, _spelled(value))

    def hexdigest(self) -> str:
        """Return the hash of everything appended so far, 64 hexadecimal digits."""
        return self._sha.hexdigest()


def _spelled(value: object) -> str | bytes:
    import enum

    import torch

    plain = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, type(None))
    if isinstance(value, plain):
        return repr(value)
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(repr, value)))
    tobytes = getattr(value, "tobytes", None)  # numpy arrays and scalars, array.array
    if callable(tobytes):
        return bytes(tobytes())
    return str(getattr(value, "__qualname__", ""))
