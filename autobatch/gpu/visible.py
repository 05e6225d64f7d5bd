"""Which GPU a CUDA ordinal means: the environment's `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER` as CUDA reads them.

Source: CUDA C++ Programming Guide, "CUDA Environment Variables", and `torch.cuda._parse_visible_devices` (torch 2.15)
for what the guide leaves out: duplicates, abbreviated UUIDs, numbers with something behind them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["visible_uuids"]

_NUMBER = re.compile(r"[+-]?[0-9]+")


def visible_uuids(
    environment: Mapping[str, str], gpus: Sequence[tuple[str, str]], *, migs: Sequence[str] = ()
) -> tuple[str, ...]:
    """List the UUIDs that CUDA numbers from 0 in a process with this environment.

    Entries are indices, GPU UUIDs or MIG UUIDs, UUIDs also by an unambiguous beginning; the first entry settles which.
    The list ends before the first entry that is invalid, and an entry that comes twice leaves no device at all.

    Args:
        environment: the process's environment.
        gpus: UUID and name of every GPU, in PCI bus order (NVML's).
        migs: UUIDs of every MIG device.

    Returns:
        UUIDs in the order of CUDA's ordinals; a GPU's own UUID also where it is in MIG mode.

    Raises:
        UsageError: GPUs of different models are counted in CUDA's own order, fastest first, which CUDA alone knows.

    Example:
        >>> visible_uuids({"CUDA_VISIBLE_DEVICES": "1,7,0"}, [("GPU-a", "T4"), ("GPU-b", "T4")])
        ('GPU-b',)
    """
    setting = environment.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        _check_order(environment, gpus)
        return tuple(uuid for uuid, _ in gpus)
    entries = [entry.strip() for entry in setting.split(",")]
    if entries[0].startswith("MIG-"):
        return _pick(entries, migs, kind="MIG-")
    if entries[0].startswith("GPU-"):
        return _pick(entries, [uuid for uuid, _ in gpus], kind="GPU-")
    picked = _pick_indices(entries, [uuid for uuid, _ in gpus])
    if picked:
        _check_order(environment, gpus)
    return picked


def _pick(entries: Sequence[str], known: Sequence[str], *, kind: str) -> tuple[str, ...]:
    """Pick UUIDs by their beginnings, up to the first that is of another kind, unknown or ambiguous."""
    picked: list[str] = []
    for entry in entries:
        matches = [uuid for uuid in known if uuid.startswith(entry)]
        if not entry.startswith(kind) or len(matches) != 1:
            break
        if matches[0] in picked:
            return ()
        picked += matches
    return tuple(picked)


def _pick_indices(entries: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Pick by index, up to the first entry that does not begin with one (`-1` among them) or lies beyond the last."""
    picked: list[str] = []
    for entry in entries:
        number = _NUMBER.match(entry)
        index = int(number[0]) if number else -1
        if not 0 <= index < len(known):
            break
        if known[index] in picked:
            return ()
        picked.append(known[index])
    return tuple(picked)


def _check_order(environment: Mapping[str, str], gpus: Sequence[tuple[str, str]]) -> None:
    """Refuse to guess the order of unlike GPUs; like ones keep their bus order under either setting."""
    names = sorted({name for _, name in gpus})
    if len(names) > 1 and environment.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST") != "PCI_BUS_ID":
        raise UsageError(
            f"{len(gpus)} GPUs of {len(names)} models ({', '.join(names)}) are numbered fastest first, an order that "
            "only CUDA knows: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or give CUDA_VISIBLE_DEVICES a GPU's UUID"
        )
