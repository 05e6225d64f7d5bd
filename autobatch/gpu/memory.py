"""How a trial reads and bounds a device's memory: the seam, and what stands behind it on CUDA."""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from autobatch.errors import NoGpuError, UnavailableError, UsageError
from autobatch.gpu.ballast import Ballast
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from types import TracebackType

    from autobatch.gpu.nvml import NvmlDevice

__all__ = ["CudaMemory", "DeviceMemory", "MemoryReading"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """What a trial has used so far, in bytes of one device."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    footprint_bytes: int
    """What NVML shows that the device gave this process beside the allocator, and the most that the allocator held:
    after a flush it holds less than that."""
    alloc_retries: int
    """Cache flushes since the trial began (`num_alloc_retries`)."""
    num_ooms: int
    """Out-of-memory errors of the allocator since the trial began, also those that the job swallowed."""
    largest_segment_bytes: int
    """The largest piece that the allocator holds from the driver: about the largest tensor of the trial."""
    tenant_growth_bytes: int
    """What others hold beyond what they held when the budget was set; 0 or more."""


class DeviceMemory(Protocol):
    """What a trial needs of the device that it runs on."""

    @property
    def device_name(self) -> str | None:
        """The device as torch names it, `cuda:0`; None where any will do."""

    @property
    def budget_bytes(self) -> int:
        """The footprint that a trial may have: device total − other tenants − headroom."""

    def begin(self) -> None:
        """Free every cache, reset the peaks and cap the allocator at the budget."""

    def settle(self) -> None:
        """After the first window: read what lies outside the allocator again, and cap accordingly."""

    def allocated_bytes(self) -> int:
        """Bytes that tensors hold now."""

    def alloc_retries(self) -> int:
        """Cache flushes of the allocator since the trial began."""

    def num_ooms(self) -> int:
        """Out-of-memory errors of the allocator since the trial began, also those that the job swallowed."""

    def read(self) -> MemoryReading:
        """What the trial has used since `begin`."""

    def is_nearly_full(self) -> bool:
        """Whether so little is free that an ambiguous error is best read as out of memory."""

    def end(self) -> None:
        """Lift the cap and free every cache. May be called again."""

    def abandon(self) -> None:
        """Leave the device alone from now on: its context is lost, and every call would fail."""


# A device with less free than this refuses cuBLAS and cuDNN their own allocations (handles, workspaces of 8 to 32 MiB).
_NEARLY_FULL_BYTES = 256 << 20
# Other processes' contexts grow by a few MiB as their kernels load; that is no new tenant.
_TENANT_SLACK_BYTES = 64 << 20
# Where NVML does not say what this process has: what may come beside the allocator (kernels, libraries) without being one.
_UNKNOWN_SLACK_BYTES = 1 << 30


class CudaMemory:
    """The memory of one CUDA device as torch's caching allocator and NVML see it.

    The footprint is `NVML total − free` less what other tenants held when the budget was set, so that it holds
    context, modules and everything else that this process took, also outside torch. NVML's `used` is not read:
    its meaning changed with driver 510 (it then counted the driver's own part, and later no longer did).

    A context manager: on the way out the allocator's cap is what it was before.
    """

    def __init__(
        self,
        device: NvmlDevice,
        ordinal: int,
        *,
        tenants_bytes: int,
        headroom_bytes: int,
        memory_limit_bytes: int | None = None,
    ) -> None:
        """Set the budget.

        Args:
            device: the device as NVML knows it.
            ordinal: the device as torch counts.
            tenants_bytes: what other processes hold on it, and the budget leaves to them.
            headroom_bytes: what the budget leaves free.
            memory_limit_bytes: the size of a smaller card that is to be stood in for, for this process alone: other
                tenants take of the rest first; None for the card itself.

        Raises:
            UsageError: the budget comes out at nothing.
            UnavailableError: the allocator is one that cannot be capped.
        """
        import torch

        _check_allocator()
        self._torch = torch
        self._device = device
        self._ordinal = ordinal
        memory = device.memory()
        usable = memory.total_bytes - memory.reserved_bytes
        self._tenants_bytes = tenants_bytes
        self._cuda_total_bytes: int = torch.cuda.get_device_properties(ordinal).total_memory
        left = min(usable - tenants_bytes, self._cuda_total_bytes)
        self._budget_bytes = min(left, memory_limit_bytes or left) - headroom_bytes
        if self._budget_bytes <= 0:
            limit = (
                ""
                if memory_limit_bytes is None
                else f", --memory-limit allows {format_bytes(memory_limit_bytes)} of it"
            )
            raise UsageError(
                f"nothing is left to try: others leave {format_bytes(left)} of {format_bytes(usable)}{limit} and the headroom "
                f"is {format_bytes(headroom_bytes)}; lower --headroom, raise --memory-limit or free the GPU"
            )
        self._ballast = Ballast()
        self._lost = False
        self._unattributed_at_first: int | None = None
        self._unattributed_at_begin = 0
        self._fraction_before: float | None = None
        self._retries_before = self._ooms_before = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    @property
    def budget_bytes(self) -> int:
        """The footprint that a trial may have."""
        return self._budget_bytes

    @property
    def context_bytes(self) -> int:
        """What this process holds outside the allocator: CUDA context, modules, other libraries."""
        return max(0, self._footprint() - self._torch.cuda.memory_reserved(self._ordinal))

    @property
    def device_name(self) -> str:
        """The device as torch names it."""
        return f"cuda:{self._ordinal}"

    def begin(self) -> None:
        """Free every cache, reset the peaks and cap the allocator at the budget."""
        self._release()
        self._torch.cuda.reset_peak_memory_stats(self._ordinal)
        stats = self._torch.cuda.memory_stats(self._ordinal)
        self._retries_before = stats.get("num_alloc_retries", 0)
        self._ooms_before = stats.get("num_ooms", 0)
        self._unattributed_at_begin = self._unattributed()[0]
        if self._unattributed_at_first is None:
            self._unattributed_at_first = self._unattributed_at_begin
        self._cap()

    def settle(self) -> None:
        """Cap again: the context has grown by the kernels that the first window loaded."""
        self._torch.cuda.synchronize(self._ordinal)
        self._cap()

    def allocated_bytes(self) -> int:
        """Bytes that tensors hold now."""
        return int(self._torch.cuda.memory_allocated(self._ordinal))

    def alloc_retries(self) -> int:
        """Cache flushes of the allocator since the trial began."""
        return int(self._torch.cuda.memory_stats(self._ordinal).get("num_alloc_retries", 0)) - self._retries_before

    def num_ooms(self) -> int:
        """Out-of-memory errors of the allocator since the trial began, also those that the job swallowed."""
        return int(self._torch.cuda.memory_stats(self._ordinal).get("num_ooms", 0)) - self._ooms_before

    def read(self) -> MemoryReading:
        """What the trial has used since `begin`."""
        stats = self._torch.cuda.memory_stats(self._ordinal)
        segments = [one for one in self._torch.cuda.memory_snapshot() if one["device"] == self._ordinal]
        peak_reserved = stats.get("reserved_bytes.all.peak", 0)
        return MemoryReading(
            peak_allocated_bytes=stats.get("allocated_bytes.all.peak", 0),
            peak_reserved_bytes=peak_reserved,
            footprint_bytes=self.context_bytes + peak_reserved,
            alloc_retries=self.alloc_retries(),
            num_ooms=stats.get("num_ooms", 0) - self._ooms_before,
            # An expandable segment is the whole arena, and grows without holes: it says nothing of the largest tensor.
            largest_segment_bytes=max(
                (one["total_size"] for one in segments if not one.get("is_expandable")), default=0
            ),
            tenant_growth_bytes=self._tenant_growth(),
        )

    def is_nearly_full(self) -> bool:
        """Whether less than 256 MiB is free on the device, or within the budget."""
        free = min(self._device.memory().free_bytes, self._budget_bytes - self._footprint())
        return free < _NEARLY_FULL_BYTES

    def end(self) -> None:
        """Lift the cap and free every cache."""
        if self._lost:
            return
        self._ballast.drop()
        if self._fraction_before is not None:
            self._torch.cuda.set_per_process_memory_fraction(self._fraction_before, self._ordinal)
            self._fraction_before = None
        self._release()

    def abandon(self) -> None:
        """Leave the device alone: every call on a lost context fails."""
        self._lost = True

    def _footprint(self) -> int:
        memory = self._device.memory()
        occupied = memory.total_bytes - memory.reserved_bytes - memory.free_bytes
        return max(0, occupied - self._tenants_bytes - self._ballast.size_bytes)

    def _unattributed(self) -> tuple[int, int]:
        """What is in use on the device and not this process's by NVML's own list, and how much of that is noise.

        Not all of it belongs to others: the driver counts some of a process's memory to nobody. So it is its growth
        since the first trial began that tells of a tenant. Where NVML does not list this process (other pid namespaces, WSL,
        some MIG set-ups), what the allocator reserved stands for its own.
        """
        own = self._device.process_bytes(os.getpid())
        if own is not None:
            return self._footprint() + self._ballast.size_bytes - own, _TENANT_SLACK_BYTES
        return self._footprint() - self._torch.cuda.memory_reserved(self._ordinal), _UNKNOWN_SLACK_BYTES

    def _tenant_growth(self) -> int:
        """What others took beyond what they held when the first trial began, now or when this one began.

        One that was there at the beginning alone counts too: the cap was set beside it, however soon it left.
        """
        unattributed, slack = self._unattributed()
        growth = max(unattributed, self._unattributed_at_begin) - (self._unattributed_at_first or 0)
        return growth if growth > slack else 0

    def _cap(self) -> None:
        reserved = self._torch.cuda.memory_reserved(self._ordinal)
        outside = max(0, self._footprint() - reserved)
        allowed = max(0, min(self._budget_bytes - outside, self._cuda_total_bytes))
        _log.debug("allocator capped at %d of %d bytes, %d outside", allowed, self._cuda_total_bytes, outside)
        if self._has_expandable_segments():
            # Under a fraction torch (2.8 to 2.15, seen on emulated cards) compares what it holds plus the whole of a
            # request with the limit, though an expandable segment maps only what is missing: it would run out early.
            # So the memory beyond the budget is taken out of its reach instead.
            free = self._device.memory().free_bytes + self._ballast.size_bytes
            self._ballast.resize(free - (allowed - reserved))
            return
        # fraction × CUDA total is what the allocator may reserve; that total is not NVML's.
        if self._fraction_before is None:
            self._fraction_before = self._torch.cuda.get_per_process_memory_fraction(self._ordinal)
        self._torch.cuda.set_per_process_memory_fraction(allowed / self._cuda_total_bytes, self._ordinal)

    def _has_expandable_segments(self) -> bool:
        settings = self._torch.cuda.memory._snapshot()["allocator_settings"]  # noqa: SLF001 - not in the public snapshot
        return bool(settings.get("expandable_segments"))

    def _release(self) -> None:
        gc.collect()
        self._torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - has no public name
        self._torch.cuda.synchronize(self._ordinal)
        self._torch.cuda.empty_cache()


def _check_allocator() -> None:
    """Refuse allocators whose figures mean something else, by their names."""
    import torch

    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        raise UnavailableError(
            "PYTORCH_NO_CUDA_MEMORY_CACHING is set: without its cache the allocator keeps no figures and cannot be capped; "
            "unset it"
        )
    if not torch.cuda.is_available():
        raise NoGpuError("torch sees no GPU")
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":
        raise UnavailableError(
            f"the CUDA allocator is {backend}, which cannot be capped or measured like the native one: remove "
            f"backend:{backend} from PYTORCH_CUDA_ALLOC_CONF"
        )
