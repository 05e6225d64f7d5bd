"""What is known of a device and of an emulated answer, apart from the trials."""

from __future__ import annotations

from dataclasses import dataclass

# Imported at run time: the JSON form resolves the annotations below.
from autobatch.report import Basis, Device, Memory

__all__ = ["DeviceFacts", "EmulationFacts"]


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What is known of the device before the first trial."""

    basis: Basis
    device: Device
    memory: Memory
    torch_version: str | None
    cuda_version: str | None
    allocator_settings: str
    """The allocator's configuration, as its environment variable has it; empty for the default."""


@dataclass(frozen=True, kw_only=True)
class EmulationFacts:
    """What an emulated answer has to say of itself; empty for a measured one."""

    data_dependent: tuple[str, ...] = ()
    not_modelled: tuple[str, ...] = ()
    expected_error: str = ""
