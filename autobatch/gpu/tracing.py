"""What torch's caching allocator gives and takes back on one device, event by event."""

from __future__ import annotations

import bisect
import contextlib
import platform
import time
from typing import TYPE_CHECKING, Any, Self

from autobatch.breakdown import AllocationEvent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autobatch.breakdown import Phase

__all__ = ["AllocatorTrace"]

# What asks the allocator for scratch memory, by names in torch's own frames (2.8 to 2.15): `allocateCUDABlasWorkspace`,
# `getCurrentCUDABlasHandle`, `CublasLtWorkspace`, and for convolutions `Workspace` and `run_conv_plan`.
_WORKSPACE_FRAMES = ("Workspace", "CUDABlasHandle", "run_conv_plan", "run_single_conv")
# The allocator's own frames, and those of taking the stack, come first.
_FRAMES_LOOKED_AT = 14
# torch unwinds C++ stacks on these machines only (torch/csrc/profiler/unwind).
_UNWINDS = ("x86_64",)


class AllocatorTrace:
    """Records the allocator by torch's own memory history, as `torch.cuda.memory._record_memory_history` keeps it.

    A context manager: recording ends on the way out. Only one can record at a time in a process, and a history that the
    job itself records is ended by it.
    """

    def __init__(self, ordinal: int) -> None:
        """Prepare to record one device.

        Args:
            ordinal: the device as torch counts.
        """
        self._ordinal = ordinal
        self.standing: Mapping[int, int] = {}
        """Bytes by address of what stood when the recording began."""
        self._phases: list[tuple[int, Phase]] = []

    def __enter__(self) -> Self:
        import torch

        # Torch 2.8 keeps the workspaces of cuBLAS, 2.15 does not: given back, they are asked for anew, and are seen.
        torch.cuda.synchronize(self._ordinal)
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - has no public name
        with_stacks = platform.machine() in _UNWINDS
        torch.cuda.memory._record_memory_history(  # noqa: SLF001 - has no public name
            "all",
            context="alloc" if with_stacks else None,
            stacks="all" if with_stacks else "python",
            clear_history=True,
        )
        self.standing = {
            block["address"]: block["requested_size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == self._ordinal
            for block in segment["blocks"]
            if block["state"] != "inactive"
        }
        self.enter_phase("forward")
        return self

    def __exit__(self, *exc_info: object) -> None:
        import torch

        with contextlib.suppress(Exception):  # where the context is lost, nothing more is recorded either
            torch.cuda.memory._record_memory_history(None)  # noqa: SLF001

    def enter_phase(self, phase: Phase) -> int:
        """Note what runs from now on.

        Returns:
            The moment, in microseconds since the epoch: that is the history's clock too.
        """
        now = time.time_ns() // 1000
        self._phases.append((now, phase))
        return now

    def read(self, moment: int) -> tuple[Sequence[AllocationEvent], int]:
        """What the allocator gave and took back so far, in order, and how many of these events came before a moment.

        Args:
            moment: in microseconds since the epoch.
        """
        import torch

        traces: list[list[dict[str, Any]]] = torch.cuda.memory._snapshot()["device_traces"]  # noqa: SLF001
        trace = [entry for entry in traces[self._ordinal] if entry["action"] in {"alloc", "free_completed"}]
        return [self._event(entry) for entry in trace], sum(entry["time_us"] <= moment for entry in trace)

    def _event(self, entry: Mapping[str, Any]) -> AllocationEvent:
        began = bisect.bisect_right([moment for moment, _ in self._phases], entry["time_us"])
        phase = self._phases[max(0, began - 1)][1]
        if entry["action"] != "alloc":
            return AllocationEvent(entry["addr"], 0, phase)
        return AllocationEvent(entry["addr"], entry["size"], phase, _asks_for_workspace(entry.get("frames", ())))


def _asks_for_workspace(frames: Sequence[Mapping[str, Any]]) -> bool:
    names = [frame["name"] for frame in frames[:_FRAMES_LOOKED_AT]]
    return any(part in name for name in names for part in _WORKSPACE_FRAMES)
