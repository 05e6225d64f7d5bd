"""A throw-away environment with the finders of others: nothing of it comes into ours, and nothing of it is left."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]

# Without what they ask for, where that is an older torch; then the little that they import without having said so.
_STEPS: tuple[tuple[str, Sequence[str]], ...] = (
    ("setuptools", ("setuptools==80.9.0",)),
    ("toma", ("--no-deps", "toma==1.1.0")),
    ("batch-probe", ("--no-deps", "batch-probe==0.4.0")),
    ("ludwig", ("--no-deps", "ludwig==0.11.0")),
    (
        "mosaicml",
        ("--no-deps", "mosaicml==0.32.1", "coolname", "torch_optimizer", "pytorch_ranger", "tabulate", "zipp"),
    ),
    ("mosaicml", ("--no-deps", "importlib-metadata<8.8", "einops", "py-cpuinfo")),
    ("mosaicml", ("mosaicml-cli==0.8.3",)),
    ("ultralytics", ("--no-deps", "ultralytics==8.4.190", "ultralytics-thop", "opencv-python-headless")),
    ("deepspeed", ("--no-deps", "--no-build-isolation", "deepspeed==0.19.8", "hjson", "ninja")),
)


@dataclass(frozen=True, kw_only=True)
class PeerEnvironment:
    """An environment that is there for a while."""

    python: str
    missing: dict[str, str]
    """What could not be installed, and why."""
    seconds: float
    """What making it took."""


@contextlib.contextmanager
def peer_environment() -> Iterator[PeerEnvironment]:
    """Make one over this interpreter's own packages, so that torch is not fetched again."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autobatch-peers-") as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        own = Path(folder) / "lib" / version / "site-packages"
        (own / "beneath.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n{ROOT / 'server'}\n")
        missing: dict[str, str] = {}
        for name, arguments in _STEPS:
            if name in missing:
                continue
            command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
            ended = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
            if ended.returncode != 0:
                lines = ended.stderr.strip().splitlines()
                missing[name] = lines[-1] if lines else f"pip ended with {ended.returncode}"
        yield PeerEnvironment(python=python, missing=missing, seconds=time.monotonic() - began)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "DS_BUILD_OPS": "0"}
