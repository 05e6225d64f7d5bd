"""What the memory of a training step is made of: whose each allocation is that stands at the peak."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["AllocationEvent", "MemoryBreakdown", "Owner", "Peak", "Phase", "find_peak"]

Phase = Literal["forward", "backward", "step"]
"""What ran: the forward of a micro-batch and all between passes, its backward, or the optimizer step with what ends a window."""

Owner = Literal["parameters", "gradients", "optimizer_state", "other_held", "activations", "temporary", "workspaces"]


@dataclass(frozen=True, kw_only=True)
class MemoryBreakdown:
    """What a size's memory is made of where the most is in use, in bytes of one device; the parts sum to its footprint.

    Found by replaying what the allocator gave and took back in one window, the last of a trial of its own.
    """

    window: tuple[int, ...]
    """The sizes of the window's micro-batches."""
    phase: Phase
    """What ran when the most was in use."""
    parameters_bytes: int
    """Parameters, frozen ones included."""
    gradients_bytes: int
    """Gradients of parameters."""
    optimizer_state_bytes: int
    """What the optimizers keep for each parameter."""
    other_held_bytes: int
    """What was there before the window besides: buffers, data that the job keeps, averages of weights."""
    activations_bytes: int
    """What a forward made and keeps: tensors saved for the backward, inputs, logits and the loss."""
    temporary_bytes: int
    """What the backward or the optimizer step made: gradients of activations, activations that a checkpoint computes again,
    and where the peak lies in the step, copies that it works on."""
    workspaces_bytes: int
    """Scratch memory of cuBLAS and cuDNN that comes from torch's allocator."""
    unused_bytes: int
    """What the allocator held from the driver, and no tensor asked for: fragmentation, rounding, free blocks."""
    context_bytes: int
    """CUDA context, modules and libraries, beside the allocator."""

    def __post_init__(self) -> None:
        for name, value in self.parts().items():
            if value < 0:
                raise ValueError(f"{name}_bytes {value} is below 0")
        if not self.window or min(self.window) < 1:
            raise ValueError(f"window {self.window} is not of sizes of 1 or more")

    def parts(self) -> dict[str, int]:
        """The parts by name, without `_bytes`, in the order in which they are declared."""
        names = [field.name for field in fields(self) if field.name.endswith("_bytes")]
        return {name.removesuffix("_bytes"): getattr(self, name) for name in names}

    @property
    def footprint_bytes(self) -> int:
        """The sum of all parts."""
        return sum(self.parts().values())

    @property
    def grows_bytes(self) -> int:
        """The parts that grow with the micro-batch: activations and temporaries."""
        return self.activations_bytes + self.temporary_bytes


@dataclass(frozen=True)
class AllocationEvent:
    """Memory that the allocator gave, or took back."""

    address: int
    size_bytes: int
    """Bytes asked for; 0 where memory came back."""
    phase: Phase = "forward"
    is_workspace: bool = False


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What stood when the most was in use."""

    phase: Phase
    bytes_by_owner: Mapping[Owner, int]
    """Bytes asked for, of each owner that has any."""

    @property
    def total_bytes(self) -> int:
        """The sum over all owners."""
        return sum(self.bytes_by_owner.values())


def find_peak(
    standing: Mapping[int, int], events: Sequence[AllocationEvent], notes: Iterable[tuple[int, Mapping[int, Owner]]]
) -> Peak:
    """Replay what the allocator did, and tell whose each allocation is that stood when the most was in use.

    Args:
        standing: bytes by address of what stood before the first event.
        events: what the allocator gave and took back, in order.
        notes: what was known at some moments: how many of the events came before, and by address whose the memory there was.
            An address is used again and again, so it means the allocation that stood there at that moment.
    """
    peak_at = _peak_position(standing, events)
    owned: dict[tuple[int, int | None], Owner] = {}
    for before, owners in notes:
        there = _live(standing, events[:before])
        owned |= {(address, there[address]): owner for address, owner in owners.items() if address in there}
    found: dict[Owner, int] = {}
    for address, born in _live(standing, events[:peak_at]).items():
        made_by = None if born is None else events[born]
        size = standing[address] if made_by is None else made_by.size_bytes
        owner = owned.get((address, born)) or _owner_by_birth(made_by)
        found[owner] = found.get(owner, 0) + size
    return Peak(phase=events[peak_at - 1].phase if peak_at else "forward", bytes_by_owner=found)


def _peak_position(standing: Mapping[int, int], events: Iterable[AllocationEvent]) -> int:
    """How many events lead to the peak, the one that reaches it included; 0 where it stood from the first."""
    sizes = dict(standing)
    total = highest = sum(sizes.values())
    position = 0
    for index, event in enumerate(events):
        total -= sizes.pop(event.address, 0)
        if event.size_bytes:
            sizes[event.address] = event.size_bytes
            total += event.size_bytes
        if total > highest:
            highest, position = total, index + 1
    return position


def _live(standing: Mapping[int, int], events: Iterable[AllocationEvent]) -> dict[int, int | None]:
    """By address, which event gave what stands after these events; None for what stood before them."""
    live: dict[int, int | None] = dict.fromkeys(standing)
    for index, event in enumerate(events):
        live.pop(event.address, None)
        if event.size_bytes:
            live[event.address] = index
    return live


def _owner_by_birth(event: AllocationEvent | None) -> Owner:
    """Whose memory is that nobody is known to own: told from when it was given."""
    if event is None:
        return "other_held"
    if event.is_workspace:
        return "workspaces"
    return "activations" if event.phase == "forward" else "temporary"
