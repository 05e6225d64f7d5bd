"""Fixtures for the emulated GPU: every torch that its scripts are to run with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from autobatch.emulator.build import build_libraries
from autobatch.emulator.torchbuild import TorchBuild

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import ScriptRun, ScriptRunner


@dataclass(frozen=True, kw_only=True)
class OlderTorch:
    """A Python whose torch is built for CUDA 12, and the emulation built for that torch."""

    python: str
    scripts: ScriptRunner

    def run(self, script: Path, cards: Sequence[str]) -> ScriptRun:
        """Run a script there to its end."""
        return self.scripts.run(script, cards, python=self.python)


@pytest.fixture(scope="session")
def older_torch(scripts: ScriptRunner) -> OlderTorch:
    """The Python named by AUTOBATCH_OLD_PYTHON; skipped where it names none."""
    python = os.environ.get("AUTOBATCH_OLD_PYTHON")
    if not python:
        pytest.skip("AUTOBATCH_OLD_PYTHON names no Python with a torch built for CUDA 12")
    root = next(Path(python).parent.parent.glob("lib/python3.*/site-packages/torch"))
    build = TorchBuild(root=root, version="old", cuda="12.8", hip=None)
    return OlderTorch(python=python, scripts=type(scripts)(libraries=build_libraries(build)))
