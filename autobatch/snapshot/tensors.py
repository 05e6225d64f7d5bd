"""Tensors whose values, memory and autograd flags are kept and put back."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, cast

from autobatch.errors import UsageError
from autobatch.snapshot.wrapped import is_sharded, local_part, sharded_as

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from autobatch.snapshot.digest import Digest

__all__ = ["HeldTensor", "LooseTensor", "SavedTensor", "assign_host_copies", "check_ordinary"]

_CHILD = "probe it from the command line, which runs each trial in a child process"


def check_ordinary(tensor: torch.Tensor, label: str) -> None:
    """Refuse a tensor whose values are not plain strided memory of this process.

    Raises:
        UsageError: the tensor is spread over processes in another way than a `DTensor`, a wrapper subclass,
            uninitialized, meta, sparse or quantized.
    """
    import torch
    from torch.nn.parameter import is_lazy

    kind = type(tensor)
    if is_lazy(tensor):
        raise UsageError(
            f"{label} is not initialized: run one forward pass first, so that lazy modules know their shapes"
        )
    if is_sharded(tensor):
        check_ordinary(local_part(tensor), f"the local part of {label}")
        return
    if any(cls.__module__.startswith("torch.distributed.") for cls in kind.__mro__):
        raise UsageError(
            f"{label} is a {kind.__name__}, sharded over processes, and cannot be put back in one: {_CHILD}"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        raise UsageError(f"{label} is a {kind.__name__}, which wraps other tensors, and cannot be put back: {_CHILD}")
    if tensor.device.type == "meta":
        raise UsageError(f"{label} is on the meta device and has no values: materialize it first (Module.to_empty)")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UsageError(
            f"{label} has layout {tensor.layout} and dtype {tensor.dtype}; only strided, unquantized tensors can be "
            f"put back: clear it before the probe where it is a gradient (optimizer.zero_grad()), else {_CHILD}"
        )


class _Layout(NamedTuple):
    """What must be the same for values to go back in place."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Layout:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> torch.Tensor:
        import torch

        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first and one-past-last address that the elements of a non-empty tensor lie in."""
    elements = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + elements * tensor.element_size()


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """View each element's memory once, as one run where no other tensor's elements lie between.

    One contiguous run copies between host and device without a temporary on the device, whatever the
    memory format; and an expanded tensor, which `copy_` refuses to write to, is written through it.
    """
    if not tensor.numel():
        return tensor
    start, end = _span(tensor)
    length = (end - start) // tensor.element_size()
    if length <= tensor.numel():
        return tensor.as_strided((length,), (1,), tensor.storage_offset())
    return tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return _elements(local_part(tensor).detach()).to("cpu", copy=True)


class SavedTensor:
    """What both kinds of kept tensors share: autograd flags, the host copy, the place in the hash."""

    def __init__(self, tensor: torch.Tensor, *, label: str, number: int) -> None:
        check_ordinary(tensor, label)
        self.label = label
        self.number = number
        self.device = tensor.device
        self.host: torch.Tensor | None = None
        self._layout = _Layout.of(local_part(tensor))
        self._is_leaf = tensor.is_leaf
        self._requires_grad = tensor.requires_grad

    def alive(self) -> torch.Tensor | None:
        """Return the very object that was saved, None where nobody holds it any more."""
        raise NotImplementedError

    def live(self) -> torch.Tensor:
        """Return the object that belongs in the slot."""
        raise NotImplementedError

    def keep(self) -> None:
        """Copy the values to host memory: blocking, not pinned."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of what the job attached, so that device memory is free before any is asked for."""

    def put_back(self) -> None:
        """Put memory and flags back."""

    def write(self) -> None:
        """Copy the values from the host into the memory put back."""
        raise NotImplementedError

    def describe_reference(self, digest: Digest) -> None:
        """Append which tensor this is; its content is appended once, by `describe`."""
        digest.add("tensor number", self.number)

    def describe(self, digest: Digest) -> None:
        """Append flags and values."""
        tensor = cast("torch.Tensor", self.alive())
        digest.add(type(tensor).__qualname__, self._is_leaf, self._requires_grad)
        digest.add_memory(local_part(tensor))

    def _settle(self, tensor: torch.Tensor) -> None:
        """Cut the tensor from a graph that the job made, and put requires_grad back."""
        if not self._is_leaf:
            return
        if tensor.grad_fn is not None:
            tensor.detach_()
        if tensor.requires_grad != self._requires_grad:
            tensor.requires_grad_(self._requires_grad)


class HeldTensor(SavedTensor):
    """A parameter, a buffer or a tensor given by the caller: its object and its memory are both kept.

    Others may hold views of the memory (tied weights, a flat buffer), so it is never exchanged for new memory.
    """

    def __init__(self, tensor: torch.Tensor, *, label: str, number: int) -> None:
        super().__init__(tensor, label=label, number=number)
        self._tensor = tensor
        # A second tensor over the same memory: it stays there whatever the job assigns to `.data`.
        self._memory = local_part(tensor).detach()
        self._storage_bytes = self._memory.untyped_storage().nbytes()
        self.grad: SavedTensor | None = None

    @property
    def present_grad(self) -> torch.Tensor | None:
        """The gradient now; None for a non-leaf tensor, whose `.grad` only warns."""
        return self._tensor.grad if self._tensor.is_leaf else None

    @property
    def address_range(self) -> tuple[int, int]:
        """First and one-past-last address of the elements; both 0 where there are none."""
        return _span(self._memory) if self._memory.numel() else (0, 0)

    @property
    def is_dense(self) -> bool:
        """True where no foreign element lies within `address_range`."""
        start, end = self.address_range
        return end - start <= self._memory.numel() * self._memory.element_size()

    def alive(self) -> torch.Tensor:
        """Return the tensor, which is held here."""
        return self._tensor

    def live(self) -> torch.Tensor:
        """Return the tensor, which is held here."""
        return self._tensor

    def keep(self) -> None:
        """Copy the values to host memory."""
        self.host = _host_copy(self._memory)

    def release(self) -> None:
        """Detach from the job's graph and drop a gradient that the job made."""
        self._settle(self._tensor)
        grad = self.present_grad
        if grad is not None and (self.grad is None or grad is not self.grad.alive()):
            self._tensor.grad = None

    def put_back(self) -> None:
        """Put memory, requires_grad and the gradient's object back."""
        storage = self._memory.untyped_storage()
        if storage.nbytes() < self._storage_bytes:  # the job freed it by storage.resize_(0)
            storage.resize_(self._storage_bytes)
        if not self._in_place():
            local_part(self._tensor).data = self._memory
        self._settle(self._tensor)
        if self.grad is not None:
            grad = self.grad.live()
            if self._tensor.grad is not grad:
                self._tensor.grad = grad

    def _in_place(self) -> bool:
        here = local_part(self._tensor)
        return here.data_ptr() == self._memory.data_ptr() and _Layout.of(here) == _Layout.of(self._memory)

    def write(self) -> None:
        """Copy the values into the memory that was saved."""
        if self.host is None:  # another tensor over the same memory carries the values
            return
        import torch

        # A buffer made under inference mode may be written to only there.
        mode = torch.inference_mode() if self._memory.is_inference() else contextlib.nullcontext()
        with mode:
            _elements(self._memory).copy_(self.host)

    def describe(self, digest: Digest) -> None:
        """Append flags, values and which gradient there is."""
        super().describe(digest)
        if self.grad is None:
            digest.add("no gradient")
        else:
            self.grad.describe_reference(digest)


class LooseTensor(SavedTensor):
    """A gradient or a tensor of an optimizer's state: the same object while anyone else holds it.

    Only a weak reference is kept. A strong one would keep the old gradients or states on the device
    beside the new ones during the trials, and memory measured then would be memory that training never uses.
    Where the object is gone, nobody can tell a new one with the same values apart from it.
    """

    def __init__(self, tensor: torch.Tensor, *, label: str, number: int) -> None:
        from torch.utils.weak import TensorWeakRef

        super().__init__(tensor, label=label, number=number)
        self._wrap = sharded_as(tensor)
        self._tensor: torch.Tensor | None = tensor
        self._reference = TensorWeakRef(tensor)

    def alive(self) -> torch.Tensor | None:
        """Return the object while anyone else holds it."""
        return cast("torch.Tensor | None", self._reference())

    def keep(self) -> None:
        """Copy the values to host memory and hold the object no longer."""
        if self._tensor is not None:
            self.host = _host_copy(self._tensor)
            self._tensor = None

    def live(self) -> torch.Tensor:
        """Return the object with its layout and flags, or a new one where it is gone."""
        from torch.utils.weak import TensorWeakRef

        tensor = self.alive()
        if tensor is None:
            tensor = self._wrap(self._layout.empty())
            self._reference = TensorWeakRef(tensor)
        elif _Layout.of(local_part(tensor)) != self._layout:
            local_part(tensor).data = self._layout.empty()
        self._settle(tensor)
        return tensor

    def write(self) -> None:
        """Copy the values into the object that `live` gave."""
        tensor = self.alive()
        # None only where the owner could not be put back, which has been noted there.
        if tensor is not None and self.host is not None:
            _elements(local_part(tensor).detach()).copy_(self.host)


def assign_host_copies(tensors: Iterable[SavedTensor]) -> None:
    """Copy values to the host, memory seen through several tensors once.

    Held tensors are swept in the order of their addresses: one that lies within a dense one before it
    is carried by that one. Views that overlap only in part are copied each; both copies agree.
    Cost: one sort, and one blocking copy per tensor that is not carried.
    """
    held = [tensor for tensor in tensors if isinstance(tensor, HeldTensor)]
    carried_to: dict[torch.device, int] = {}
    for tensor in sorted(held, key=lambda each: (each.address_range[0], -each.address_range[1], not each.is_dense)):
        _, end = tensor.address_range
        if end <= carried_to.get(tensor.device, 0):
            continue
        tensor.keep()
        if tensor.is_dense:
            carried_to[tensor.device] = end
    for other in tensors:
        if isinstance(other, LooseTensor):
            other.keep()
