"""What the device will be, told before anything is started on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.emulator.machine import DRIVER_VERSION
from autobatch.errors import AutobatchError
from autobatch.gpu.allocator import allocator_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autobatch.options import ProbeOptions
    from autobatch.report import Basis

__all__ = ["Outlook", "look_at_device"]


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A device that trials will run on."""

    basis: Basis
    name: str
    """As the driver names it."""
    total_bytes: int
    driver: str
    tenants_bytes: int
    """What others hold of it now."""
    allocator_settings: str
    """As the allocator's environment variable has them."""


def look_at_device(options: ProbeOptions, environment: Mapping[str, str]) -> Outlook | None:
    """Look at the device that a probe is asked for; None where it cannot be told from outside.

    Args:
        options: what names the device, or the card to emulate.
        environment: the variables that the job will see.
    """
    allocator = allocator_settings(environment)
    if options.emulate is not None:
        from autobatch.gpu.catalogue import find_card

        card = find_card(options.emulate)
        return Outlook(
            basis="emulated",
            name=card.nvml_name,
            total_bytes=card.nvml_total_bytes,
            driver=DRIVER_VERSION,
            tenants_bytes=options.tenant_bytes,
            allocator_settings=allocator,
        )
    if environment.get("CUDA_VISIBLE_DEVICES") != os.environ.get("CUDA_VISIBLE_DEVICES"):
        return None  # the ordinal counts the job's devices, not ours
    from autobatch.gpu.nvml import NvmlSession
    from autobatch.gpu.opening import parse_ordinal

    try:
        with NvmlSession() as session:
            device = session.device(parse_ordinal(options.device))
            return Outlook(
                basis="emulated" if session.driver_version == DRIVER_VERSION else "measured",
                name=device.name,
                total_bytes=device.total_bytes,
                driver=session.driver_version,
                tenants_bytes=device.other_tenants_bytes(0),
                allocator_settings=allocator,
            )
    except AutobatchError:  # told in full by what opens the device
        return None
