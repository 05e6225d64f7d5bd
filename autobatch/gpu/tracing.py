"""What torch's caching allocator gives and takes back on one device, event by event."""

from __future__ import annotations

import bisect
import contextlib
import platform
import time
from typing import TYPE_CHECKING, Any, Self

from autobatch.breakdown import AllocationEvent
from autobatch.errors import UnavailableError

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

    A context manager: recording ends on the way out. A process has one history: where the job records it itself, nothing
    of it is touched.
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
        """Begin.

        Raises:
            UnavailableError: the process records the allocator's history already.
        """
        import torch

        if self._history():
            raise UnavailableError(
                "the job records the allocator's history itself (torch.cuda.memory._record_memory_history), and there is one "
                "only: leave that out for the probe"
            )
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

    @property
    def phase(self) -> Phase:
        """What runs now."""
        return self._phases[-1][1]

    def enter_phase(self, phase: Phase) -> None:
        """Note what runs from now on."""
        self._phases.append((self.now(), phase))

    @staticmethod
    def now() -> int:
        """The moment, in microseconds since the epoch: that is the history's clock too."""
        return time.time_ns() // 1000

    def read(self, moments: Sequence[int]) -> tuple[Sequence[AllocationEvent], Sequence[int]]:
        """What the allocator gave and took back so far, in order, and how many of these events came before each moment.

        Args:
            moments: in microseconds since the epoch.
        """
        trace = [entry for entry in self._history() if entry["action"] in {"alloc", "free_completed"}]
        times = [entry["time_us"] for entry in trace]
        return [self._event(entry) for entry in trace], [bisect.bisect_right(times, moment) for moment in moments]

    def _history(self) -> list[dict[str, Any]]:
        import torch

        traces: list[list[dict[str, Any]]] = torch.cuda.memory._snapshot()["device_traces"]  # noqa: SLF001
        return traces[self._ordinal] if self._ordinal < len(traces) else []

    def _event(self, entry: Mapping[str, Any]) -> AllocationEvent:
        began = bisect.bisect_right(self._phases, entry["time_us"], key=lambda noted: noted[0])
        phase = self._phases[max(0, began - 1)][1]
        if entry["action"] != "alloc":
            return AllocationEvent(entry["addr"], 0, phase)
        return AllocationEvent(entry["addr"], entry["size"], phase, _asks_for_workspace(entry.get("frames", ())))


def _asks_for_workspace(frames: Sequence[Mapping[str, Any]]) -> bool:
    names = [frame["name"] for frame in frames[:_FRAMES_LOOKED_AT]]
    return any(part in name for name in names for part in _WORKSPACE_FRAMES)
