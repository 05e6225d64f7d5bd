"""What is known of a device and of an emulated answer, apart from the trials."""

from __future__ import annotations

from dataclasses import dataclass

# Imported at run time: the JSON form resolves the annotations below.
from autobatch.report import Basis, Device, Memory

__all__ = ["AnswerRemarks", "DeviceFacts"]


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
class AnswerRemarks:
    """What an answer has to say of itself beyond its trials."""

    data_dependent: tuple[str, ...] = ()
    not_modelled: tuple[str, ...] = ()
    expected_error: str = ""
    warnings: tuple[str, ...] = ()
    unaccumulated: str = ""
    """What to say of a plan that accumulates, where the trials could not; empty where they could."""
