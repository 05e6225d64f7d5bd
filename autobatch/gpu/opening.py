"""Open the device that trials run on: what it is, what others hold of it, and what is left to try."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.emulator.machine import DRIVER_VERSION
from autobatch.errors import NoGpuError, UsageError
from autobatch.facts import DeviceFacts
from autobatch.gpu.allocator import allocator_settings
from autobatch.gpu.memory import CudaMemory
from autobatch.gpu.nvml import NvmlSession
from autobatch.report import Device, Memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autobatch.gpu.memory import DeviceMemory
    from autobatch.gpu.nvml import NvmlDevice
    from autobatch.options import ProbeOptions

__all__ = ["OpenDevice", "open_device", "parse_ordinal"]

_WAYS_OUT = (
    "--emulate GPU answers for a card that is not here, and `autobatch emulate GPU -- COMMAND` runs a program on one"
)


@dataclass(frozen=True, kw_only=True)
class OpenDevice:
    """A device that is ready for trials."""

    ordinal: int
    facts: DeviceFacts
    memory: DeviceMemory


def parse_ordinal(device: str) -> int:
    """Read a CUDA device's ordinal off its name, `cuda` or `cuda:N`.

    Raises:
        NoGpuError: it names a device of another kind, which cannot be measured.
        UsageError: it is no device's name.
    """
    kind, colon, index = device.partition(":")
    if kind in {"cpu", "mps", "xpu", "hip", "xla", "npu"}:
        raise NoGpuError(f"device {device} cannot be measured: autobatch reads NVIDIA GPUs through NVML; {_WAYS_OUT}")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise UsageError(f"device {device!r} is not a CUDA device: write cuda or cuda:N")
    return int(index) if index else 0


def check_torch_build() -> None:
    """Refuse a torch that has no CUDA, by what it has instead.

    Raises:
        NoGpuError: torch is missing, or a build for ROCm, for Apple's GPUs or for the CPU alone.
    """
    from autobatch.emulator.torchbuild import find_torch

    build = find_torch()
    if build is None:
        raise NoGpuError("torch is not installed here: pip install torch")
    if build.hip is not None:
        raise NoGpuError(
            f"torch {build.version} is a build for ROCm {build.hip}: autobatch measures NVIDIA GPUs; install a CUDA build "
            "of torch to measure one or to emulate one"
        )
    if build.cuda is None:
        raise NoGpuError(
            f"torch {build.version} is a build without CUDA (CPU or Apple MPS): install a CUDA build, on Linux with "
            "`pip install torch`; it measures an NVIDIA GPU, and emulates one where there is none"
        )


@contextlib.contextmanager
def open_device(options: ProbeOptions) -> Iterator[OpenDevice]:
    """Open the device that `options` name, in this process.

    Raises:
        NoGpuError: there is none, or not one that can be measured.
        UsageError: the device's name is malformed, or the budget comes out at nothing.
    """
    check_torch_build()
    ordinal = parse_ordinal(options.device)
    with NvmlSession() as session, contextlib.ExitStack() as stack:
        device = session.device(ordinal)
        # Read before the first CUDA call: what is in use now and not ours belongs to others.
        tenants_bytes = _tenants_bytes(device, ordinal)
        stack.enter_context(_current_device(ordinal))
        torch_version, cuda_version = _start_cuda(ordinal)
        memory = device.memory()
        # A share of the card that is stood in for, where one is.
        headroom_bytes = options.headroom_bytes(
            min(memory.total_bytes, options.memory_limit_bytes or memory.total_bytes)
        )
        with CudaMemory(
            device,
            ordinal,
            tenants_bytes=tenants_bytes or 0,
            headroom_bytes=headroom_bytes,
            memory_limit_bytes=options.memory_limit_bytes,
        ) as cuda_memory:
            facts = DeviceFacts(
                basis="emulated" if session.driver_version == DRIVER_VERSION else "measured",
                device=_describe(device, ordinal, session.driver_version),
                memory=Memory(
                    budget_bytes=cuda_memory.budget_bytes,
                    headroom_bytes=headroom_bytes,
                    other_tenants_bytes=tenants_bytes,
                    context_bytes=cuda_memory.context_bytes,
                ),
                torch_version=torch_version,
                cuda_version=cuda_version,
                allocator_settings=allocator_settings(os.environ),
            )
            yield OpenDevice(ordinal=ordinal, facts=facts, memory=cuda_memory)


def _tenants_bytes(device: NvmlDevice, ordinal: int) -> int | None:
    """What other processes hold; None where this process is on the device and NVML does not say with how much."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and ordinal < torch.cuda.device_count():
        torch.cuda.mem_get_info(ordinal)  # makes this process's context, without which NVML does not list it
        own = device.process_bytes(os.getpid())
    else:
        # `torch.cuda.set_device` makes a context too, before torch counts CUDA as initialized.
        own = device.process_bytes(os.getpid()) or 0
    return None if own is None else device.other_tenants_bytes(own)


@contextlib.contextmanager
def _current_device(ordinal: int) -> Iterator[None]:
    """Make the device torch's current one, and the one before it afterwards."""
    import torch

    if ordinal >= torch.cuda.device_count():  # explained by the caller
        yield
        return
    before = torch.cuda.current_device() if torch.cuda.is_initialized() else ordinal
    torch.cuda.set_device(ordinal)
    torch.cuda.init()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # a lost context: nothing works on it any more
            torch.cuda.set_device(before)


def _start_cuda(ordinal: int) -> tuple[str, str | None]:
    import torch

    count = torch.cuda.device_count()
    if ordinal >= count:
        known = f"this process sees {count} (cuda:0 to cuda:{count - 1})" if count else "this process sees none"
        raise NoGpuError(f"there is no cuda:{ordinal}: {known}; look at CUDA_VISIBLE_DEVICES, or {_WAYS_OUT}")
    check_architecture(torch.cuda.get_arch_list(), torch.cuda.get_device_capability(ordinal), str(torch.__version__))
    return str(torch.__version__), torch.version.cuda


def check_architecture(built_for: Sequence[str], capability: tuple[int, int], version: str) -> None:
    """Refuse a card for which torch has no kernels: real training would end at its first one.

    Machine code runs on its own major version from its minor version on, PTX (`compute_`) on anything newer. Source: CUDA
    C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".

    Args:
        built_for: what `torch.cuda.get_arch_list` gives, such as `sm_80` and `compute_120`.
        capability: the card's compute capability.
        version: torch's version, for the message.

    Raises:
        NoGpuError: none of them runs on the card.
    """
    for name in built_for:
        kind, _, number = name.partition("_")
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")  # sm_90a: the same, with features of that one version
        if not digits.isdecimal():
            continue
        built = int(digits[:-1]), int(digits[-1])
        if (kind == "sm" and built[0] == capability[0] and built <= capability) or (
            kind == "compute" and built <= capability
        ):
            return
    if built_for:
        needed = "{}.{}".format(*capability)
        raise NoGpuError(
            f"torch {version} has no kernels for compute capability {needed} of this card, only {', '.join(built_for)}: "
            "install a build of torch that has them (often an older one, or one for an older CUDA)"
        )


def _describe(device: NvmlDevice, ordinal: int, driver: str) -> Device:
    import torch

    major, minor = torch.cuda.get_device_capability(ordinal)
    return Device(
        name=device.name,
        uuid=device.uuid,
        total_bytes=device.memory().total_bytes,
        compute_capability=f"{major}.{minor}",
        driver=driver,
    )
