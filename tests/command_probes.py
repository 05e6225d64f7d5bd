"""Probes of the example commands on an emulated card."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import autobatch

if TYPE_CHECKING:
    from autobatch.report import Report

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "examples" / "commands"
CARD = "RTX-3060-12GB"
SIZES = ("--batch-size", "{micro_batch_size}", "--accumulate", "{accumulation_steps}")
SMALL = ("--width", "64")


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def probe(script: str, *arguments: str, launcher: tuple[str, ...] = (), **options: Any) -> Report:
    command = [sys.executable, *launcher, str(SCRIPTS / script), *arguments]
    options = {"emulate": CARD, "headroom": 0, "target": 64, "environment": environment(), **options}
    return autobatch.probe_command(command, **options)
