"""NVML: devices by CUDA ordinal, memory readings, tenants, and the translation of every error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from autobatch.errors import NoGpuError, UnavailableError, UsageError
from autobatch.gpu.nvml import GpuProcess, NvmlMemory, NvmlSession
from autobatch.gpu.visible import visible_uuids

GIB = 1 << 30
MIB = 1 << 20


@dataclass(kw_only=True)
class FakeGpu:
    """A GPU or a MIG device as the fake driver keeps it."""

    uuid: str
    name: str = "NVIDIA A100-SXM4-40GB"
    total: int = 40 * GIB
    free: int = 30 * GIB
    reserved: int = 512 * MIB
    compute: list[tuple[int, int | None]] = field(default_factory=list)
    graphics: list[tuple[int, int | None]] | None = None
    migs: list[FakeGpu | None] | None = None
    denied: bool = False


class FakeNvml:
    """The part of `pynvml` that is used, over GPUs in memory, raising pynvml's own exceptions."""

    def __init__(self, *gpus: FakeGpu, memory_v2: bool = True, fails: dict[str, int] | None = None) -> None:
        self._gpus = gpus
        self._memory_v2 = memory_v2
        self._fails = fails or {}
        self.open_count = 0
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("NVMLError"):
            return getattr(pynvml, name)
        if name.startswith("nvml"):
            self.calls.append(name)
            if name in self._fails:
                raise pynvml.NVMLError(self._fails[name])
            if name != "nvmlInit" and self.open_count == 0:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's own name, as are those below
        self.open_count += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open_count -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "550.54.15"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 12040

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        if self._gpus[index].denied:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return self._gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        slices = [one for gpu in self._gpus for one in gpu.migs or () if one is not None]
        for gpu in (*self._gpus, *slices):
            if gpu.uuid == uuid:
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:  # noqa: N802
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:  # noqa: N802
        return gpu.name

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:  # noqa: N802
        return 8, 0

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, version: int | None = None) -> SimpleNamespace:  # noqa: N802
        if version is None:
            return SimpleNamespace(total=gpu.total, free=gpu.free, used=-1)
        if not self._memory_v2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        assert version == pynvml.nvmlMemory_v2
        return SimpleNamespace(total=gpu.total, free=gpu.free, reserved=gpu.reserved, used=-1)

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> tuple[int, int]:  # noqa: N802
        if gpu.migs is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return int(bool(gpu.migs)), int(bool(gpu.migs))

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: FakeGpu) -> int:  # noqa: N802
        return len(gpu.migs or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: FakeGpu, index: int) -> FakeGpu:  # noqa: N802
        found = (gpu.migs or ())[index]
        if found is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return found

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.compute]

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:  # noqa: N802
        if gpu.graphics is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.graphics]


A, B, C = (FakeGpu(uuid=f"GPU-{letter * 8}-0000") for letter in "abc")
SLICED = FakeGpu(
    uuid="GPU-dddddddd-0000",
    migs=[
        None,
        FakeGpu(uuid="MIG-1111", total=5 * GIB, free=4 * GIB, reserved=0),
        FakeGpu(uuid="MIG-2222", total=20 * GIB, free=GIB),
    ],
)


def no_cuda(ordinal: int) -> str | None:
    return None


def session(
    *gpus: FakeGpu, environment: dict[str, str] | None = None, cuda: dict[int, str] | None = None, **driver: Any
) -> NvmlSession:
    return NvmlSession(
        FakeNvml(*gpus, **driver), environment=environment or {}, cuda_uuid=(cuda or {}).get if cuda else no_cuda
    )


def test_a_session_opens_once_and_shuts_on_the_last_way_out() -> None:
    """Entered again while open, NVML stays open until the outermost exit, an exception's too."""
    api = FakeNvml(A)
    nvml = NvmlSession(api)
    with nvml:
        with nvml:
            assert api.open_count == 1
        assert api.open_count == 1
        assert nvml.driver_version == "550.54.15"
    assert api.open_count == 0
    with pytest.raises(KeyError), nvml:
        raise KeyError
    assert api.open_count == 0


def test_nothing_can_be_asked_of_a_shut_session() -> None:
    """A device outlives its session as a name only: every reading is an error, never a stale figure."""
    nvml = session(A)
    with nvml:
        device = nvml.device(0)
    for ask in (device.memory, device.processes, lambda: nvml.device(0), lambda: nvml.driver_version):
        with pytest.raises(RuntimeError, match="not open"):
            ask()


def test_a_session_that_cannot_start_has_nothing_to_shut() -> None:
    """After a failed start the driver sees no shutdown."""
    api = FakeNvml(A, fails={"nvmlInit": pynvml.NVML_ERROR_DRIVER_NOT_LOADED})
    with pytest.raises(NoGpuError), NvmlSession(api):
        pass
    assert api.calls == ["nvmlInit"]


def test_the_machine_without_a_gpu_says_what_can_be_done() -> None:
    """The real bindings on a machine without a driver: no GPU, and both ways to go on without one."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        pass
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(NoGpuError, match="--emulate GPU") as caught, NvmlSession():
        pass
    assert "autobatch emulate GPU" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_versions_read_as_people_write_them() -> None:
    """The driver's CUDA version comes as 12040 and is 12.4; a device gives both as its session does."""
    with session(A) as nvml:
        device = nvml.device(0)
        assert (nvml.driver_version, nvml.cuda_driver_version) == ("550.54.15", "12.4")
        assert (device.driver_version, device.cuda_driver_version) == ("550.54.15", "12.4")
        assert device.compute_capability == (8, 0)


def test_memory_is_read_with_what_the_driver_keeps() -> None:
    """Memory info v2 gives total, free and reserved; `used` plays no part."""
    with session(A) as nvml:
        device = nvml.device(0)
        memory = device.memory()
    assert memory == NvmlMemory(total_bytes=40 * GIB, free_bytes=30 * GIB, reserved_bytes=512 * MIB)
    assert memory.occupied_bytes == 10 * GIB - 512 * MIB


def test_the_single_figures_are_read_anew() -> None:
    """A device keeps no reading."""
    gpu = FakeGpu(uuid="GPU-a")
    with session(gpu) as nvml:
        device = nvml.device(0)
        assert (device.total_bytes, device.free_bytes, device.reserved_bytes) == (40 * GIB, 30 * GIB, 512 * MIB)
        gpu.free = 7 * GIB
        assert device.free_bytes == 7 * GIB


def test_an_old_driver_gives_no_reserved_memory() -> None:
    """Without memory info v2 the first version serves, and reserved is 0."""
    with session(A, memory_v2=False) as nvml:
        assert nvml.device(0).memory() == NvmlMemory(total_bytes=40 * GIB, free_bytes=30 * GIB, reserved_bytes=0)


def test_a_failed_reading_raises() -> None:
    """An error of the driver is no figure."""
    with session(A, fails={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_GPU_IS_LOST}) as nvml:
        device = nvml.device(0)
        with pytest.raises(UnavailableError, match="reboot"):
            device.memory()


@pytest.mark.parametrize(("total", "free", "reserved"), [(0, 0, 0), (40 * GIB, 41 * GIB, 0), (40 * GIB, 40 * GIB, 1)])
def test_a_senseless_reading_raises(total: int, free: int, reserved: int) -> None:
    """More free than there is, or no memory at all, is a failed reading."""
    gpu = FakeGpu(uuid="GPU-a", total=total, free=free, reserved=reserved)
    with session(gpu) as nvml, pytest.raises(UnavailableError, match="makes no sense"):
        nvml.device(0).memory()


def test_other_tenants_hold_what_is_neither_free_nor_kept_nor_ours() -> None:
    """Total - reserved - free - own, and nothing rather than a negative figure."""
    with session(A) as nvml:
        device = nvml.device(0)
        assert device.other_tenants_bytes(4 * GIB) == 6 * GIB - 512 * MIB
        assert device.other_tenants_bytes(0) == 10 * GIB - 512 * MIB
        assert device.other_tenants_bytes(20 * GIB) == 0


def test_processes_of_both_kinds_are_listed_once() -> None:
    """A process that computes and draws appears once; a figure that the driver withholds is None, not 0."""
    gpu = FakeGpu(
        uuid="GPU-a", compute=[(9, 3 * GIB), (4, None), (7, None)], graphics=[(9, 3 * GIB), (7, MIB), (2, MIB)]
    )
    with session(gpu) as nvml:
        device = nvml.device(0)
        assert device.processes() == (
            GpuProcess(pid=2, used_bytes=MIB),
            GpuProcess(pid=4, used_bytes=None),
            GpuProcess(pid=7, used_bytes=MIB),
            GpuProcess(pid=9, used_bytes=3 * GIB),
        )
        assert [device.process_bytes(pid) for pid in (9, 4, 12345)] == [3 * GIB, None, None]


def test_a_card_without_graphics_lists_its_compute_processes() -> None:
    """Data-centre cards do not answer for graphics, WSL and some containers for nothing: a process is then not known."""
    with session(FakeGpu(uuid="GPU-a", compute=[(9, GIB)])) as nvml:
        assert nvml.device(0).process_bytes(9) == GIB
    fails = {"nvmlDeviceGetComputeRunningProcesses": pynvml.NVML_ERROR_NOT_SUPPORTED}
    with session(A, fails=fails) as nvml:
        assert nvml.device(0).processes() == ()
        assert nvml.device(0).process_bytes(9) is None


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, "abc"),
        ("0,1,2", "abc"),
        ("2,0", "ca"),
        (" 1 , 0 ", "ba"),
        ("1", "b"),
        ("", ""),
        ("-1", ""),
        ("0,-1,1", "a"),
        ("1,7,0", "b"),
        ("0,x,1", "a"),
        ("0,,1", "a"),
        ("NoDevFiles", ""),
        ("1gpu2,0", "ba"),
        ("0,1,0", ""),
        ("GPU-cccccccc-0000,GPU-aaaaaaaa-0000", "ca"),
        ("GPU-c,GPU-a", "ca"),
        ("GPU-", ""),
        ("GPU-b,GPU-x,GPU-a", "b"),
        ("GPU-b,0", "b"),
        ("0,GPU-b", "a"),
        ("GPU-b,GPU-bbb", ""),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(setting: str | None, expected: str) -> None:
    """Indices and UUIDs, also abbreviated; the list ends at what is invalid, and a duplicate empties it."""
    environment = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    seen = visible_uuids(environment, [(gpu.uuid, gpu.name) for gpu in (A, B, C)])
    assert [uuid[4] for uuid in seen] == list(expected)


def test_an_ambiguous_beginning_ends_the_list() -> None:
    """A UUID that two GPUs begin with names none."""
    assert visible_uuids({"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-12"}, [("GPU-12", "T4"), ("GPU-13", "T4")]) == ()


def test_the_ordinal_leads_to_the_gpu_that_cuda_means() -> None:
    """Ordinals count through CUDA_VISIBLE_DEVICES; the device's UUID and readings are those of that GPU."""
    gpus = (A, dataclasses.replace(B, free=GIB), C)
    with session(*gpus, environment={"CUDA_VISIBLE_DEVICES": "2,1"}) as nvml:
        assert [nvml.device(ordinal).uuid for ordinal in (0, 1)] == [C.uuid, B.uuid]
        assert nvml.device(1).free_bytes == GIB
        with pytest.raises(
            NoGpuError, match="sees 2 of 3 GPUs under CUDA_VISIBLE_DEVICES='2,1'; choose cuda:0 to cuda:1"
        ):
            nvml.device(2)
        with pytest.raises(NoGpuError, match="count from 0"):
            nvml.device(-1)


def test_hidden_and_absent_gpus_are_told_apart() -> None:
    """No device because all are hidden asks for CUDA_VISIBLE_DEVICES; none on the machine offers emulation."""
    with session(A, environment={"CUDA_VISIBLE_DEVICES": ""}) as nvml, pytest.raises(NoGpuError) as hidden:
        nvml.device(0)
    assert "sees 0 of 1 GPUs under CUDA_VISIBLE_DEVICES=''" in str(hidden.value)
    assert "--emulate" not in str(hidden.value)
    with session() as nvml, pytest.raises(NoGpuError, match="--emulate"):
        nvml.device(0)


def test_unlike_gpus_are_not_numbered_by_guess() -> None:
    """CUDA puts the fastest first by default; where models differ only CUDA, the bus order or a UUID settles it."""
    fast = FakeGpu(uuid="GPU-f", name="NVIDIA H100 80GB HBM3")
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}):
        with session(A, fast, environment=environment) as nvml:
            with pytest.raises(UsageError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
                nvml.device(0)
            assert nvml.device_names() == (A.name, fast.name)
    with session(A, fast, environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) as nvml:
        assert nvml.device(1).uuid == "GPU-f"
    with session(A, fast, environment={"CUDA_VISIBLE_DEVICES": "GPU-f"}) as nvml:
        assert nvml.device(0).uuid == "GPU-f"
    with session(A, fast, cuda={0: "f", 1: "aaaaaaaa-0000"}) as nvml:
        assert [nvml.device(ordinal).uuid for ordinal in (0, 1)] == ["GPU-f", A.uuid]


def test_what_cuda_reports_comes_before_the_environment() -> None:
    """A program may have changed CUDA_VISIBLE_DEVICES after CUDA started; CUDA's own answer stands."""
    with session(A, B, environment={"CUDA_VISIBLE_DEVICES": "0"}, cuda={0: "bbbbbbbb-0000"}) as nvml:
        assert nvml.device(0).uuid == B.uuid


def test_a_mig_device_is_read_by_its_own_handle() -> None:
    """A MIG UUID, abbreviated or not, leads to the slice and its memory, whatever CUDA reports for its GPU."""
    for name in ("MIG-2222", "MIG-2"):
        with session(A, SLICED, environment={"CUDA_VISIBLE_DEVICES": name}, cuda={0: "dddddddd-0000"}) as nvml:
            device = nvml.device(0)
            assert (device.uuid, device.total_bytes) == ("MIG-2222", 20 * GIB)
    with (
        session(SLICED, environment={"CUDA_VISIBLE_DEVICES": "MIG-9"}) as nvml,
        pytest.raises(NoGpuError, match="MIG-9"),
    ):
        nvml.device(0)


def test_a_gpu_in_mig_mode_is_its_first_slice() -> None:
    """By index CUDA enumerates the first MIG device, not the whole GPU; empty slots are passed over."""
    with session(SLICED) as nvml:
        assert nvml.device(0).uuid == "MIG-1111"
    with session(SLICED, cuda={0: "2222"}) as nvml:
        assert nvml.device(0).uuid == "MIG-2222"


def test_a_gpu_that_a_cgroup_keeps_away_is_not_counted() -> None:
    """NVML counts it and refuses to open it, CUDA numbers the others."""
    with session(dataclasses.replace(A, denied=True), B) as nvml:
        assert nvml.device(0).uuid == B.uuid
        assert nvml.device_names() == (B.name,)


def test_all_gpus_of_the_machine_can_be_listed() -> None:
    """The list is the machine's, whatever this process may see of it through CUDA."""
    with session(A, B, environment={"CUDA_VISIBLE_DEVICES": ""}) as nvml:
        assert [device.uuid for device in nvml.devices()] == [A.uuid, B.uuid]


NO_GPU = {
    "NVML_ERROR_DRIVER_NOT_LOADED",
    "NVML_ERROR_LIBRARY_NOT_FOUND",
    "NVML_ERROR_NOT_FOUND",
    "NVML_ERROR_GPU_NOT_FOUND",
}
WAYS_OUT = {
    "NVML_ERROR_DRIVER_NOT_LOADED": "--emulate",
    "NVML_ERROR_LIBRARY_NOT_FOUND": "--emulate",
    "NVML_ERROR_NOT_FOUND": "nvidia-smi -L",
    "NVML_ERROR_GPU_NOT_FOUND": "nvidia-smi -L",
    "NVML_ERROR_NO_PERMISSION": "/dev/nvidia",
    "NVML_ERROR_OPERATING_SYSTEM": "cgroup",
    "NVML_ERROR_GPU_IS_LOST": "reboot",
    "NVML_ERROR_RESET_REQUIRED": "nvidia-smi --gpu-reset",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "reload",
    "NVML_ERROR_FUNCTION_NOT_FOUND": "update the driver",
    "NVML_ERROR_NOT_SUPPORTED": "does not offer",
}


@pytest.mark.parametrize("name", sorted(one for one in dir(pynvml) if one.startswith("NVML_ERROR_")))
def test_every_nvml_error_is_translated(name: str) -> None:
    """Each code of the bindings becomes an error of this package, with what was done, NVML's words and the way out."""
    code = getattr(pynvml, name)
    with (
        session(A, fails={"nvmlSystemGetDriverVersion": code}) as nvml,
        pytest.raises(UnavailableError, match="read the driver's version") as caught,
    ):
        _ = nvml.driver_version
    message = str(caught.value)
    assert isinstance(caught.value, NoGpuError) == (name in NO_GPU)
    assert isinstance(caught.value.__cause__, pynvml.NVMLError)
    assert str(caught.value.__cause__) in message
    assert WAYS_OUT.get(name, "") in message
    assert "\n" not in message
