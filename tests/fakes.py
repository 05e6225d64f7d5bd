"""Devices and jobs for tests on CPU tensors: memory is scripted, out-of-memory errors are raised where the test says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from autobatch.facts import DeviceFacts
from autobatch.gpu.memory import MemoryReading
from autobatch.gpu.opening import OpenDevice
from autobatch.report import Device, Memory
from autobatch.workload.job import TrainingJob

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20


def out_of_memory(requested: str = "2.00 GiB") -> torch.OutOfMemoryError:
    """The error as the caching allocator raises it."""
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {requested}. GPU 0 has a total capacity of 8.00 GiB"
    )


def _ignore(_call: str) -> None:
    pass


@dataclass
class ScriptedMemory:
    """A device whose memory a job uses by saying so: `use` raises out of memory above the budget, and counts it.

    The allocator holds what was used at most until the trial ends, and the context lies beside it.
    """

    budget_bytes: int = 1000 * MIB
    context_bytes: int = 100 * MIB
    hidden_bytes: int = 0
    """Taken beside the allocator, which raises nothing: what a spill into system memory looks like."""
    tenant_growth_bytes: int = 0
    nearly_full: bool = False
    held_bytes: Callable[[], int] = int
    """What tensors hold whenever it is asked."""
    on_call: Callable[[str], None] = _ignore
    """Told the name of each call before it does anything."""
    peak_bytes: int = 0
    reserved_bytes: int = 0
    retries: int = 0
    ooms: int = 0
    calls: list[str] = field(default_factory=list)

    @property
    def begun(self) -> int:
        """Trials that began."""
        return self.calls.count("begin")

    @property
    def ended(self) -> int:
        """Trials that ended."""
        return self.calls.count("end")

    # ---- what a job does ------------------------------------------------------------------------------------------

    def use(self, size_bytes: int, reserved_bytes: int | None = None) -> None:
        """Hold so much, in a reserve as large unless said otherwise; or fail as the allocator would."""
        if size_bytes + self.context_bytes > self.budget_bytes:
            self.ooms += 1
            raise out_of_memory(f"{size_bytes / MIB:.2f} MiB")
        self.peak_bytes = max(self.peak_bytes, size_bytes)
        self.reserved_bytes = max(self.reserved_bytes, size_bytes if reserved_bytes is None else reserved_bytes)

    def flush(self) -> None:
        """Flush the cache once, and go on."""
        self.retries += 1

    # ---- what a trial asks ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._note("begin")
        self.peak_bytes = self.reserved_bytes = self.retries = self.ooms = 0

    def settle(self) -> None:
        self._note("settle")

    def allocated_bytes(self) -> int:
        return self.held_bytes()

    def alloc_retries(self) -> int:
        return self.retries

    def read(self) -> MemoryReading:
        self._note("read")
        return MemoryReading(
            peak_allocated_bytes=self.peak_bytes,
            peak_reserved_bytes=self.reserved_bytes,
            footprint_bytes=self.reserved_bytes + self.context_bytes + self.hidden_bytes,
            alloc_retries=self.retries,
            num_ooms=self.ooms,
            largest_segment_bytes=self.peak_bytes // 10,
            tenant_growth_bytes=self.tenant_growth_bytes,
        )

    def is_nearly_full(self) -> bool:
        return self.nearly_full

    @property
    def device_name(self) -> None:
        """Any device: the jobs of these tests are on the CPU."""
        return

    def abandon(self) -> None:
        self.calls.append("abandon")

    def end(self) -> None:
        self._note("end")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.on_call(call)


def scripted_device(memory: ScriptedMemory) -> OpenDevice:
    """An open device, said to be real so that its trials are timed."""
    facts = DeviceFacts(
        basis="measured",
        device=Device(
            name="scripted",
            uuid="GPU-scripted",
            total_bytes=memory.budget_bytes,
            compute_capability="8.0",
            driver="0",
        ),
        memory=Memory(
            budget_bytes=memory.budget_bytes,
            headroom_bytes=0,
            other_tenants_bytes=0,
            context_bytes=memory.context_bytes,
        ),
        torch_version=torch.__version__,
        cuda_version=None,
        allocator_settings="",
    )
    return OpenDevice(ordinal=0, facts=facts, memory=memory)


def linear_use(memory: ScriptedMemory, per_sample_bytes: int = MIB, base_bytes: int = 0) -> Callable[[int], None]:
    """What a micro-step calls with its size to use memory in proportion."""
    return lambda n: memory.use(base_bytes + n * per_sample_bytes)


def small_job(use: Callable[[int], object], *, end_window: Callable[[], object] | None = None) -> TrainingJob:
    """A job that trains eight weights by Adam; each micro-step first calls `use` with its size."""
    model = torch.nn.Linear(4, 2, bias=False)

    def micro_step(n: int) -> None:
        use(n)
        model(torch.ones(1, 4)).sum().backward()

    return TrainingJob(
        micro_step=micro_step, optimizer=torch.optim.Adam(model.parameters(), lr=0.1), end_window=end_window
    )
