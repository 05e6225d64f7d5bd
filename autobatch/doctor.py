"""Examine what a probe needs on this machine, and name the mend for what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from autobatch.errors import AutobatchError
from autobatch.gpu.allocator import allocator_settings

__all__ = ["Finding", "examine", "has_way_to_probe", "missing_packages"]

# What autobatch imports besides torch, by module, with the distribution's name and what it is needed for.
_PACKAGES = {
    "pynvml": ("nvidia-ml-py", "both"),
    "rich": ("rich", "both"),
    "psutil": ("psutil", "both"),
    "platformdirs": ("platformdirs", "emulate"),
    "elftools": ("pyelftools", "emulate"),
    "sqlalchemy": ("sqlalchemy", "both"),
    "alembic": ("alembic", "both"),
    "ruamel": ("ruamel.yaml", "both"),
    "tomlkit": ("tomlkit", "both"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: what was looked at.
        ok: whether it is as a probe needs it.
        found: what is there, in a few words.
        mend: what to do about it; empty where nothing need be done.
        needed_for: `measure` (a real card), `emulate`, or `both`.
    """

    what: str
    ok: bool
    found: str
    mend: str = ""
    needed_for: str = "both"


def examine() -> list[Finding]:
    """Look at everything that a probe needs, in the order in which it needs it."""
    return [_system(), _torch(), _packages(), _gpu(), _allocator(), _compiler(), _shared_memory(), _emulation()]


def has_way_to_probe(findings: list[Finding]) -> bool:
    """Whether a probe can run here: everything it needs is there, on a real card or on an emulated one."""
    broken = {finding.needed_for for finding in findings if not finding.ok}
    return "both" not in broken and not {"measure", "emulate"} <= broken


def _system() -> Finding:
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if platform.system() != "Linux":
        return Finding(
            what="system",
            ok=False,
            found=system,
            mend="autobatch runs on Linux: use a Linux machine, or WSL 2 on Windows",
        )
    if "microsoft" in platform.release().lower():
        mend = "on WSL the driver spills into system memory instead of failing: budgets are kept by NVML's reading"
        return Finding(what="system", ok=True, found=f"{system} (WSL)", mend=mend)
    return Finding(what="system", ok=True, found=system)


def _torch() -> Finding:
    from autobatch.emulator.torchbuild import find_torch
    from autobatch.gpu.opening import check_torch_build

    try:
        check_torch_build()
    except AutobatchError as error:
        found, _, mend = str(error).partition(": ")
        return Finding(what="torch", ok=False, found=found, mend=mend)
    build = find_torch()
    version = build.version if build else "unknown"
    return Finding(what="torch", ok=True, found=f"{version}, built for CUDA {build.cuda if build else None}")


def missing_packages(*, needed_for: str = "both") -> list[str]:
    """Distributions that autobatch needs and that are not installed, as pip knows them.

    Args:
        needed_for: `emulate` for those that an emulated card needs beside the others; `both` for all.
    """
    wanted = {name: package for name, (package, use) in _PACKAGES.items() if needed_for in {use, "both"}}
    return [package for name, package in wanted.items() if importlib.util.find_spec(name) is None]


def _packages() -> Finding:
    missing = missing_packages()
    if missing:
        found = f"{', '.join(missing)} missing"
        return Finding(what="packages", ok=False, found=found, mend=f"pip install {' '.join(missing)}")
    return Finding(what="packages", ok=True, found="all that autobatch needs")


def _gpu() -> Finding:
    from autobatch.gpu.presence import find_presence

    presence = find_presence()
    if presence.usable:
        return Finding(what="GPU", ok=True, found=", ".join(card.name for card in presence.cards), needed_for="measure")
    mend = (
        "is the driver loaded (nvidia-smi)? in a container, was it started with --gpus all?"
        if presence.any_sign
        else "nothing, if it is to be so: probes emulate a card (--emulate chooses one)"
    )
    return Finding(what="GPU", ok=False, found=presence.problem, mend=mend, needed_for="measure")


def _allocator() -> Finding:
    settings = allocator_settings(os.environ)
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return Finding(what="allocator", ok=False, found="PYTORCH_NO_CUDA_MEMORY_CACHING is set", mend="unset it")
    if "backend:cudaMallocAsync" in settings.replace(" ", ""):
        return Finding(
            what="allocator",
            ok=False,
            found=settings,
            mend="remove backend:cudaMallocAsync: it cannot be capped or measured",
        )
    return Finding(what="allocator", ok=True, found=settings or "torch's own, with its defaults")


def _compiler() -> Finding:
    from autobatch.emulator.build import find_compiler

    compiler = find_compiler()
    if compiler is None:
        mend = "apt install gcc, or dnf install gcc, or pip install ziglang; it is used once"
        return Finding(what="C compiler", ok=False, found="none", mend=mend, needed_for="emulate")
    return Finding(what="C compiler", ok=True, found=" ".join(compiler), needed_for="emulate")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")  # noqa: S108 - where the emulated cards live
    if folder.is_dir() and os.access(folder, os.W_OK):
        return Finding(what="shared memory", ok=True, found=str(folder), needed_for="emulate")
    mend = "the temporary folder is used instead; processes of other containers will not see the emulated card"
    return Finding(what="shared memory", ok=True, found=f"{folder} cannot be written", mend=mend, needed_for="emulate")


def _emulation() -> Finding:
    from autobatch.emulator.build import build_libraries

    if missing := missing_packages(needed_for="emulate"):
        mend = f"pip install {' '.join(missing)}"
        return Finding(what="emulated GPU", ok=False, found="not built", mend=mend, needed_for="emulate")
    try:
        libraries = build_libraries()
    except AutobatchError as error:
        found, _, mend = str(error).partition(": ")
        return Finding(what="emulated GPU", ok=False, found=found, mend=mend, needed_for="emulate")
    return Finding(what="emulated GPU", ok=True, found=f"built in {libraries.folder}", needed_for="emulate")
