"""Programs of Debian's packages in a folder of their own, for tests that need the real thing and install nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["unpack_packages"]


def unpack_packages(folder: Path, *packages: str) -> Path:
    """Download packages and unpack them without running anything of them; skips the test where that cannot be done."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("needs apt-get and dpkg, which fetch Debian's packages")
    downloads, prefix = folder / "downloads", folder / "prefix"
    downloads.mkdir()
    done = subprocess.run(
        ["apt-get", "download", *packages], cwd=downloads, capture_output=True, text=True, check=False
    )
    if done.returncode and os.geteuid() == 0:  # a machine whose lists are not there yet
        subprocess.run(["apt-get", "-qq", "update"], capture_output=True, check=False)
        done = subprocess.run(
            ["apt-get", "download", *packages], cwd=downloads, capture_output=True, text=True, check=False
        )
    if done.returncode:
        pytest.skip(f"Debian's packages cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    for archive in downloads.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive, prefix], check=True)
    shutil.rmtree(downloads)
    return prefix
