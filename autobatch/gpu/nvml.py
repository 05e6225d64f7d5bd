"""What NVML says of a GPU: its identity, its memory, who uses it.

Footprints are always `total - reserved - free`. NVML's `used` is not read: up to driver 510 it left out what the driver
keeps for itself, from 510 on memory info v1 counts it in, and v2 reports it apart as `reserved`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autobatch.errors import NoGpuError, UnavailableError
from autobatch.gpu.visible import visible_uuids
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

__all__ = ["GpuProcess", "NvmlDevice", "NvmlMemory", "NvmlSession"]

# NVML_STRUCT_VERSION(Memory, 2) in nvml.h: the size of nvmlMemory_v2_t and its version.
_MEMORY_V2 = 40 | 2 << 24
_UNKNOWN_TO_DRIVER = ("FunctionNotFound", "NotSupported")
_WAYS_OUT = (
    "on a machine without a GPU, --emulate GPU answers for a card that is not here, "
    "and `autobatch emulate GPU -- COMMAND` runs any program on one"
)


@dataclass(frozen=True, kw_only=True)
class NvmlMemory:
    """One reading of a device's memory, in bytes."""

    total_bytes: int
    """All of it, the driver's own part included; more than CUDA's total."""
    free_bytes: int
    """What any process may still take."""
    reserved_bytes: int
    """What the driver and the firmware keep; 0 where the driver is too old to tell it apart (below 510)."""

    def __post_init__(self) -> None:
        if not 0 <= self.free_bytes + self.reserved_bytes <= self.total_bytes or self.total_bytes == 0:
            raise UnavailableError(
                f"NVML's reading makes no sense: {format_bytes(self.free_bytes)} free and "
                f"{format_bytes(self.reserved_bytes)} reserved of {format_bytes(self.total_bytes)}; see `nvidia-smi`"
            )

    @property
    def occupied_bytes(self) -> int:
        """What processes hold, all together."""
        return self.total_bytes - self.reserved_bytes - self.free_bytes


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """A process that holds a context on a device."""

    pid: int
    """Its id as the driver knows it; in a container that may be the host's."""
    used_bytes: int | None
    """What it holds; None where the driver does not say (Windows, WSL, some containers)."""


class NvmlSession:
    """NVML, opened and shut.

    A context manager that may be entered again while it is open; the last way out shuts it. NVML counts openings per
    process too, so sessions beside this one, in other libraries, are not disturbed. Forked children need their own.

    Example:
        >>> with NvmlSession() as session:  # doctest: +SKIP
        ...     session.device(0).memory().free_bytes
        42285268992
    """

    def __init__(
        self,
        api: Any = None,
        *,
        environment: Mapping[str, str] | None = None,
        cuda_uuid: Callable[[int], str | None] | None = None,
    ) -> None:
        """Prepare a session; nothing is opened yet.

        Args:
            api: the `pynvml` module, or what stands in for it; None imports it when the session is opened.
            environment: what `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER` are read from; None for the process's own.
            cuda_uuid: gives the UUID that CUDA itself reports for an ordinal, or None where CUDA has not started in
                this process; None asks torch where it is loaded and has started CUDA.
        """
        self._given_api = api
        self._environment = os.environ if environment is None else environment
        self._cuda_uuid = _torch_uuid if cuda_uuid is None else cuda_uuid
        self._api: Any = None
        self._depth = 0

    def __enter__(self) -> Self:
        if self._depth == 0:
            api = _import_pynvml() if self._given_api is None else self._given_api
            with _translated(api, "start NVML"):
                api.nvmlInit()
            self._api = api
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            api, self._api = self._api, None
            with _translated(api, "shut NVML"):
                api.nvmlShutdown()

    def call(self, function: str, *args: Any, what: str, absent: tuple[str, ...] = ()) -> Any:
        """Call one NVML function.

        Args:
            function: its name in `pynvml`.
            args: its arguments.
            what: what is being done, for the message of an error: "read the memory of GPU-…".
            absent: names of NVML's error classes that are an answer here, `NotSupported` say: None is returned.

        Raises:
            NoGpuError: there is no driver, or no such GPU.
            UnavailableError: anything else that NVML reports, in its own words.
            RuntimeError: the session is not open.
        """
        if self._api is None:
            raise RuntimeError(f"cannot {what}: the NVML session is not open")
        answers = tuple(getattr(self._api, f"NVMLError_{name}") for name in absent)
        with _translated(self._api, what), contextlib.suppress(*answers):
            return getattr(self._api, function)(*args)
        return None

    @property
    def driver_version(self) -> str:
        """The driver's version, as `550.54.15`."""
        return str(self.call("nvmlSystemGetDriverVersion", what="read the driver's version"))

    @property
    def cuda_driver_version(self) -> str:
        """The newest CUDA that the driver serves, as `12.4`."""
        number = int(self.call("nvmlSystemGetCudaDriverVersion_v2", what="read the driver's CUDA version"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def device_names(self) -> tuple[str, ...]:
        """Name every GPU of the machine in NVML's order, whatever CUDA_VISIBLE_DEVICES says."""
        return tuple(name for _, name in self._gpus())

    def devices(self) -> tuple[NvmlDevice, ...]:
        """Open every GPU of the machine in NVML's order, whatever CUDA_VISIBLE_DEVICES says."""
        return tuple(self._open(uuid) for uuid, _ in self._gpus())

    def device(self, ordinal: int) -> NvmlDevice:
        """Open the device that CUDA, and so torch, calls `cuda:ordinal` in this process.

        What CUDA itself says is taken where it has started; else the environment is read as CUDA would. A GPU in MIG
        mode that goes by its index is, as for CUDA, the first of its MIG devices.

        Args:
            ordinal: CUDA's number of the device, from 0.

        Raises:
            NoGpuError: CUDA shows this process no such device.
            UsageError: it cannot be told which GPU is meant (see `autobatch.gpu.visible`).
            UnavailableError: NVML fails.
        """
        if ordinal < 0:
            raise NoGpuError(f"there is no cuda:{ordinal}: ordinals count from 0")
        setting = self._environment.get("CUDA_VISIBLE_DEVICES")
        # For a MIG device CUDA may report the UUID of its GPU, while the environment names the slice itself.
        if not (setting or "").strip().startswith("MIG-"):
            reported = self._cuda_uuid(ordinal)
            if reported is not None:
                return self._open_reported(reported)
        gpus = self._gpus()
        visible = visible_uuids(self._environment, gpus, migs=self._mig_uuids(gpus))
        if ordinal >= len(visible):
            raise NoGpuError(_missing(ordinal, len(visible), len(gpus), setting))
        return self._open(visible[ordinal])

    def _open_reported(self, reported: str) -> NvmlDevice:
        uuids = {uuid for uuid, _ in self._gpus()}
        bare = reported.removeprefix("GPU-").removeprefix("MIG-")
        return self._open(f"GPU-{bare}" if f"GPU-{bare}" in uuids else f"MIG-{bare}")

    def _open(self, uuid: str) -> NvmlDevice:
        """Open a device by UUID; a GPU in MIG mode is its first MIG device, as it is for CUDA."""
        handle = self.call("nvmlDeviceGetHandleByUUID", uuid, what=f"open {uuid}")
        if not uuid.startswith("MIG-"):
            slices = self._mig_handles(handle, uuid)
            if slices:
                handle, uuid = slices[0], self._uuid(slices[0])
        name = str(self.call("nvmlDeviceGetName", handle, what=f"read the name of {uuid}"))
        return NvmlDevice(session=self, handle=handle, uuid=uuid, name=name)

    def _gpus(self) -> list[tuple[str, str]]:
        """UUID and name of every GPU that this process may use, in NVML's order, which is that of the PCI bus."""
        count = int(self.call("nvmlDeviceGetCount", what="count the GPUs"))
        handles = [
            self.call("nvmlDeviceGetHandleByIndex", index, what=f"open GPU {index}", absent=("NoPermission",))
            for index in range(count)
        ]
        # NVML counts GPUs that a cgroup keeps from this process; CUDA skips them, and so its numbers do.
        return [
            (self._uuid(handle), str(self.call("nvmlDeviceGetName", handle, what="read a GPU's name")))
            for handle in handles
            if handle is not None
        ]

    def _uuid(self, handle: Any) -> str:
        return str(self.call("nvmlDeviceGetUUID", handle, what="read a GPU's UUID"))

    def _mig_uuids(self, gpus: list[tuple[str, str]]) -> list[str]:
        """UUIDs of the MIG devices of all GPUs."""
        found: list[str] = []
        for uuid, _ in gpus:
            handle = self.call("nvmlDeviceGetHandleByUUID", uuid, what=f"open {uuid}")
            found += [self._uuid(one) for one in self._mig_handles(handle, uuid)]
        return found

    def _mig_handles(self, handle: Any, uuid: str) -> list[Any]:
        """Open a GPU's MIG devices; none where it is not in MIG mode or knows of none."""
        modes = self.call(
            "nvmlDeviceGetMigMode", handle, what=f"read the MIG mode of {uuid}", absent=_UNKNOWN_TO_DRIVER
        )
        if modes is None or modes[0] == 0:
            return []
        slots = int(self.call("nvmlDeviceGetMaxMigDeviceCount", handle, what=f"count the MIG devices of {uuid}"))
        found = [
            self.call(
                "nvmlDeviceGetMigDeviceHandleByIndex",
                handle,
                slot,
                what=f"open MIG device {slot} of {uuid}",
                absent=("NotFound",),  # a slot without an instance
            )
            for slot in range(slots)
        ]
        return [one for one in found if one is not None]


@dataclass(frozen=True, kw_only=True)
class NvmlDevice:
    """A GPU, or a MIG device, that NVML reads. Good for as long as its session is open."""

    session: NvmlSession = field(repr=False, compare=False)
    handle: Any = field(repr=False, compare=False)
    uuid: str
    """`GPU-…` or `MIG-…`."""
    name: str
    """As `nvidia-smi` prints it."""

    def memory(self) -> NvmlMemory:
        """Read the memory now; of a MIG device, its own.

        Raises:
            UnavailableError: the reading failed, or makes no sense.
        """
        what, read = "read the memory", "nvmlDeviceGetMemoryInfo"
        info = self._call(read, _MEMORY_V2, what=what, absent=(*_UNKNOWN_TO_DRIVER, "ArgumentVersionMismatch"))
        reserved = 0 if info is None else int(info.reserved)
        if info is None:
            info = self._call(read, what=what)
        return NvmlMemory(total_bytes=int(info.total), free_bytes=int(info.free), reserved_bytes=reserved)

    @property
    def total_bytes(self) -> int:
        """NVML's total, read now."""
        return self.memory().total_bytes

    @property
    def free_bytes(self) -> int:
        """What is free, read now."""
        return self.memory().free_bytes

    @property
    def reserved_bytes(self) -> int:
        """What the driver keeps for itself, read now."""
        return self.memory().reserved_bytes

    @property
    def driver_version(self) -> str:
        """The driver's version, as `550.54.15`."""
        return self.session.driver_version

    @property
    def cuda_driver_version(self) -> str:
        """The newest CUDA that the driver serves, as `12.4`."""
        return self.session.cuda_driver_version

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor."""
        major, minor = self._call("nvmlDeviceGetCudaComputeCapability", what="read the compute capability")
        return int(major), int(minor)

    def processes(self) -> tuple[GpuProcess, ...]:
        """List the processes that hold a context, computing or drawing, by id."""
        used: dict[int, int | None] = {}
        for one in (*self._running("Compute"), *self._running("Graphics")):
            pid, held = int(one.pid), one.usedGpuMemory
            # A process that computes and draws is in both lists with the same figure.
            used[pid] = held if used.get(pid) is None else max(used[pid] or 0, held or 0)
        return tuple(GpuProcess(pid=pid, used_bytes=held) for pid, held in sorted(used.items()))

    def process_bytes(self, pid: int) -> int | None:
        """Read what one process holds on this device.

        Args:
            pid: its id, as this machine counts; inside a container the driver may know it by another.

        Returns:
            Bytes; None where NVML does not list the process, or lists it without a figure.
        """
        return next((one.used_bytes for one in self.processes() if one.pid == pid), None)

    def other_tenants_bytes(self, own_bytes: int) -> int:
        """Read what everyone but the caller holds: total - reserved - free - own.

        Args:
            own_bytes: what the caller holds (`process_bytes`, or 0 before its first CUDA call).

        Returns:
            Bytes, at least 0: where the caller gave memory back between the two readings, nothing is left for others.
        """
        return max(0, self.memory().occupied_bytes - own_bytes)

    def _running(self, kind: str) -> list[Any]:
        # Not every card answers for both, and under WSL, vGPU and some containers none does: a process is then not
        # among those listed, which its reader has to reckon with.
        absent = (*_UNKNOWN_TO_DRIVER, "NoPermission")
        found = self._call(f"nvmlDeviceGet{kind}RunningProcesses", what="list the processes", absent=absent)
        return list(found or ())

    def _call(self, function: str, *args: Any, what: str, absent: tuple[str, ...] = ()) -> Any:
        return self.session.call(function, self.handle, *args, what=f"{what} of {self.uuid}", absent=absent)


def _missing(ordinal: int, visible: int, present: int, setting: str | None) -> str:
    """Say why an ordinal names no device, and what to do."""
    if not present:
        return f"there is no cuda:{ordinal}: NVML lists no GPU that this process may use; {_WAYS_OUT}"
    hidden = "" if setting is None else f" under CUDA_VISIBLE_DEVICES={setting!r}"
    sees = f"this process sees {visible} of {present} GPUs{hidden}"
    way_out = f"choose cuda:0 to cuda:{visible - 1}, or change" if visible else "change"
    return f"there is no cuda:{ordinal}: {sees}; {way_out} CUDA_VISIBLE_DEVICES"


def _import_pynvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise UnavailableError("NVML's Python bindings are missing: pip install nvidia-ml-py") from error
    return pynvml


def _torch_uuid(ordinal: int) -> str | None:
    """The UUID that CUDA reports through torch; None where torch is not loaded or has not started CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or ordinal >= torch.cuda.device_count():
        return None
    reported = getattr(torch.cuda.get_device_properties(ordinal), "uuid", None)
    return None if reported is None else str(reported)


@contextlib.contextmanager
def _translated(api: Any, what: str) -> Iterator[None]:
    """Turn NVML's errors into this package's: the one place where that happens."""
    try:
        yield
    except api.NVMLError as error:
        kind, way_out = _MEANINGS.get(int(error.value), (UnavailableError, ""))
        raise kind(f"cannot {what}: NVML says {str(error)!r}" + (f": {way_out}" if way_out else "")) from error


# By NVML's return codes (nvmlReturn_t in nvml.h, the same in every version).
_MEANINGS: dict[int, tuple[type[UnavailableError], str]] = {
    3: (UnavailableError, "this GPU or its mode does not offer it"),
    4: (UnavailableError, "the user or the container lacks the right; check the access to /dev/nvidia* and the cgroup"),
    6: (NoGpuError, "no such device on this machine; `nvidia-smi -L` lists those there are"),
    9: (NoGpuError, f"the NVIDIA driver is not loaded; {_WAYS_OUT}"),
    12: (NoGpuError, f"no NVIDIA driver is installed; {_WAYS_OUT}"),
    13: (UnavailableError, "the NVIDIA driver is too old for it; update the driver"),
    15: (UnavailableError, "the GPU has fallen off the bus; reboot the machine"),
    16: (UnavailableError, "the GPU needs a reset; stop what uses it and run `nvidia-smi --gpu-reset`, or reboot"),
    17: (UnavailableError, "the operating system or the container blocks it; check the cgroup's devices"),
    18: (UnavailableError, "the driver was updated under a running kernel; reload its module or reboot"),
    28: (NoGpuError, "no such device on this machine; `nvidia-smi -L` lists those there are"),
}
