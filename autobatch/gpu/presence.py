"""Whether this machine has an NVIDIA GPU, told without torch: device nodes, the driver's library, and NVML."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from autobatch.errors import AutobatchError

__all__ = ["Presence", "PresentCard", "find_presence"]

# The driver's own signs on Linux; /dev/dxg is the one of WSL.
_SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")


@dataclass(frozen=True, kw_only=True)
class PresentCard:
    """A card that NVML sees."""

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    is_emulated: bool = False
    """Whether no card is behind it, but `autobatch emulate`."""


@dataclass(frozen=True, kw_only=True)
class Presence:
    """What there is of a GPU on this machine.

    Attributes:
        usable: NVML answers and names at least one card (a real one, or an emulated one by `autobatch emulate`).
        any_sign: something of an NVIDIA GPU or its driver is there, be it broken.
        problem: what is wrong, in a few words; empty where the GPU is usable.
        cards: the cards, in NVML's order.
    """

    usable: bool
    any_sign: bool
    problem: str
    cards: tuple[PresentCard, ...] = ()


def find_presence() -> Presence:
    """Look for an NVIDIA GPU."""
    from autobatch.gpu.nvml import NvmlSession

    signs = [sign for sign in _SIGNS if Path(sign).exists()]
    emulated = os.environ.get("AUTOBATCH_EMULATED_GPU", "")
    try:
        with NvmlSession() as session:
            cards = tuple(
                PresentCard(
                    name=device.name,
                    uuid=device.uuid,
                    total_bytes=device.total_bytes,
                    free_bytes=device.free_bytes,
                    is_emulated=bool(emulated),
                )
                for device in session.devices()
            )
    except AutobatchError as error:
        return Presence(usable=False, any_sign=bool(signs or emulated), problem=_problem(signs, emulated, str(error)))
    if not cards:
        return Presence(usable=False, any_sign=bool(signs or emulated), problem="NVML lists no GPU")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in {"", "-1"}:
        problem = "CUDA_VISIBLE_DEVICES hides every GPU from this process"
        return Presence(usable=False, any_sign=True, problem=problem, cards=cards)
    return Presence(usable=True, any_sign=True, problem="", cards=cards)


def _problem(signs: list[str], emulated: str, error: str) -> str:
    if signs:
        return f"there are signs of an NVIDIA GPU ({', '.join(signs)}) but it cannot be used: {error}"
    if emulated:
        return f"the emulated GPU of AUTOBATCH_EMULATED_GPU={emulated} cannot be used: {error}"
    return "no NVIDIA GPU on this machine"
