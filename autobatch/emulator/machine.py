"""The shared state of the emulated cards: one small file, mapped by every process on them.

The layout is that of `csrc/state.h`; `abg_layout_bytes` of the compiled driver tells whether the two agree.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from autobatch.emulator.torchbuild import find_torch
from autobatch.errors import EmulatorError, UsageError
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from autobatch.emulator.build import Libraries
    from autobatch.gpu.catalogue import Card

__all__ = ["DRIVER_VERSION", "MOST_DEVICES", "EmulatedMachine", "check_tenant"]

DRIVER_VERSION = "0.1.emulated"
"""What NVML gives as the driver's version on an emulated card: no driver is there. The number rises where emulated jobs take
other memory than before, so that what was remembered of them belongs to another driver."""

_MAGIC = 0x55504742
_LAYOUT_VERSION = 2
MOST_DEVICES = 16
"""Cards that one machine may have."""
_MAX_PROCESSES = 256
_MAX_UNSUPPORTED = 64
_PREFIX = "autobatch-gpu-"


class _Device(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 96),
        ("uuid", ctypes.c_uint8 * 16),
        ("nvml_total_bytes", ctypes.c_uint64),
        ("cuda_total_bytes", ctypes.c_uint64),
        ("context_bytes", ctypes.c_uint64),
        ("tenant_bytes", ctypes.c_uint64),
        ("l2_bytes", ctypes.c_uint64),
        ("major", ctypes.c_int32),
        ("minor", ctypes.c_int32),
        ("sm_count", ctypes.c_int32),
        ("max_threads_per_sm", ctypes.c_int32),
        ("max_blocks_per_sm", ctypes.c_int32),
        ("shared_per_block_optin", ctypes.c_int32),
        ("shared_per_sm", ctypes.c_int32),
        ("memory_bus_bits", ctypes.c_int32),
    )


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint32),
        ("has_context", ctypes.c_uint32),
        ("start_time", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64 * MOST_DEVICES),
    )


class _Machine(ctypes.Structure):
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("layout_version", ctypes.c_uint32),
        ("device_count", ctypes.c_uint32),
        ("cuda_version", ctypes.c_uint32),
        ("driver_version", ctypes.c_char * 32),
        ("owner_pid", ctypes.c_uint32),
        ("unsupported_count", ctypes.c_uint32),
        ("unsupported", (ctypes.c_char * 64) * _MAX_UNSUPPORTED),
        ("devices", _Device * MOST_DEVICES),
        ("processes", _Process * _MAX_PROCESSES),
        ("lock", ctypes.c_uint64 * 16),
    )


def check_tenant(card: Card, tenant_bytes: int) -> None:
    """Refuse a tenant that a card has no room for; raises `UsageError`."""
    if not 0 <= tenant_bytes <= card.cuda_total_bytes:
        raise UsageError(
            f"a tenant of {format_bytes(tenant_bytes)} does not fit on {card.name}, which has "
            f"{format_bytes(card.cuda_total_bytes)}: make --tenant smaller"
        )


class EmulatedMachine:
    """A machine with emulated cards, for as long as it is open.

    A context manager: what it leaves in shared memory goes when it closes. Files that a killed owner
    left behind are removed when the next machine is made.

    Attributes:
        cards: the cards, in the order of their indices.
        path: the file that holds the shared state.
    """

    def __init__(self, cards: Sequence[Card], libraries: Libraries, *, tenant_bytes: int = 0) -> None:
        """Make the machine.

        Args:
            cards: one entry for each card, at most 16.
            libraries: the compiled emulation.
            tenant_bytes: bytes of each card that an imaginary other process holds.

        Raises:
            UsageError: there are no cards or too many, or the tenant is larger than a card.
            EmulatorError: shared memory cannot be had, or the libraries are of another version.
        """
        if not 1 <= len(cards) <= MOST_DEVICES:
            raise UsageError(f"{len(cards)} emulated cards asked for: between 1 and {MOST_DEVICES} can be had")
        for card in cards:
            check_tenant(card, tenant_bytes)
        self.cards = tuple(cards)
        self._libraries = libraries
        self._preload = _preload_entry(libraries)
        layout = self._load_layout()
        _remove_orphans()
        try:
            self._descriptor, self.path = _create_file()
        except OSError as error:
            raise EmulatorError(f"cannot make shared memory for the emulated GPU: {error.strerror}") from error
        self._map = mmap.mmap(self._descriptor, ctypes.sizeof(_Machine))
        self._state = _Machine.from_buffer(self._map)
        if error_number := layout.abg_make_lock(ctypes.byref(self._state)):
            self.close()
            raise EmulatorError(f"cannot make the emulated GPU's lock: {os.strerror(error_number)}")
        self._fill(tenant_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the shared memory back. Processes still on the machine keep their mapping; new ones find none."""
        self.path.unlink(missing_ok=True)
        if hasattr(self, "_state"):
            del self._state
            self._map.close()
            os.close(self._descriptor)

    def environment(self, base: dict[str, str] | None = None) -> dict[str, str]:
        """The environment in which a program finds the emulated cards instead of real ones.

        Args:
            base: the environment to start from; this process's where None.
        """
        variables = dict(os.environ if base is None else base)
        variables["AUTOBATCH_EMULATED_GPU"] = str(self.path)
        for name, value in (
            ("LD_PRELOAD", self._preload),
            ("LD_LIBRARY_PATH", str(self._libraries.folder)),
        ):
            before = variables.get(name, "")
            variables[name] = f"{value}:{before}" if before else value
        # A choice of real cards says nothing about emulated ones, and these are numbered as NVML lists them.
        variables.pop("CUDA_VISIBLE_DEVICES", None)
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        return variables

    def unsupported_calls(self) -> tuple[str, ...]:
        """Names of calls that programs made and that the emulation does not have, in the order of the first time."""
        return tuple(self._state.unsupported[i].value.decode() for i in range(self._state.unsupported_count))

    def process_bytes(self) -> dict[int, tuple[int, ...]]:
        """Bytes on each card of every process that is on the machine, by process id."""
        count = len(self.cards)
        return {entry.pid: tuple(entry.bytes[:count]) for entry in self._state.processes if entry.pid}

    def _load_layout(self) -> ctypes.CDLL:
        layout = ctypes.CDLL(str(self._libraries.layout))
        layout.abg_layout_bytes.restype = ctypes.c_uint64
        if (found := layout.abg_layout_bytes()) != ctypes.sizeof(_Machine):
            raise EmulatorError(
                f"the emulated GPU in {self._libraries.folder} has a state of {found} bytes, this version "
                f"{ctypes.sizeof(_Machine)}: remove that folder, and it is built again"
            )
        return layout

    def _fill(self, tenant_bytes: int) -> None:
        state, torch_build = self._state, find_torch()
        state.layout_version = _LAYOUT_VERSION
        state.device_count = len(self.cards)
        state.cuda_version = (torch_build.cuda_number if torch_build else 0) or 13000
        state.driver_version = DRIVER_VERSION.encode()
        state.owner_pid = os.getpid()
        for index, card in enumerate(self.cards):
            device = state.devices[index]
            device.name = card.nvml_name.encode()
            seed = hashlib.sha256(f"{self.path.name}/{index}".encode()).digest()
            device.uuid = (ctypes.c_uint8 * 16)(*seed[:16])
            device.nvml_total_bytes = card.nvml_total_bytes
            device.cuda_total_bytes = card.cuda_total_bytes
            device.context_bytes = card.context_bytes
            device.tenant_bytes = tenant_bytes
            device.l2_bytes = card.l2_bytes
            device.major, device.minor = card.compute_capability
            device.sm_count = card.sm_count
            device.max_threads_per_sm = card.max_threads_per_sm
            device.max_blocks_per_sm = card.max_blocks_per_sm
            device.shared_per_block_optin = card.shared_per_block_optin_bytes
            device.shared_per_sm = card.shared_per_sm_bytes
            device.memory_bus_bits = card.memory_bus_bits
        state.magic = _MAGIC  # last: with it, the state is whole


def _preload_entry(libraries: Libraries) -> str:
    """The preload library as `LD_PRELOAD` can say it: by its name alone where blanks or colons would part its path."""
    if any(mark in str(libraries.folder) for mark in ":;"):
        raise EmulatorError(
            f"the emulated GPU lies in {libraries.folder}, and a library path cannot hold ':' or ';': "
            "set XDG_CACHE_HOME to a folder without them"
        )
    return libraries.preload.name if re.search(r"\s", str(libraries.folder)) else str(libraries.preload)


def _folder() -> Path:
    shared = Path("/dev/shm")  # noqa: S108 - shared memory is what is wanted
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def _create_file() -> tuple[int, Path]:
    """Make the machine's file, whole and locked; the lock goes when its owner ends, however that comes about."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_folder())
        path = Path(name)
        try:
            # Allocated now: where shared memory is full, a later write would end the process by a signal.
            os.posix_fallocate(descriptor, 0, ctypes.sizeof(_Machine))
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        if path.exists():
            return descriptor, path
        os.close(descriptor)  # taken for an orphan before it was locked


def _remove_orphans() -> None:
    """Remove the files that nobody holds any more: neither their owner nor a process on the machine."""
    for path in _folder().glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, held by someone, or already gone
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
