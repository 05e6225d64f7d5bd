"""How long the command line takes to start: `--help` against a bare interpreter, and a cold emulated probe.

Run by hand: `python tests/benchmarks/start_up.py`. The bar for the ratio is 20, for the probe 20 s on two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}
REPEATS = 15
BAR = 20.0

AUTOBATCH = (sys.executable, "-m", "autobatch")
PROBE = (*AUTOBATCH, "probe", "gpt2", "--target", "256", "--emulate", "A100-SXM4-40GB", "--format", "json")


def seconds(command: tuple[str, ...]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def help_ratio() -> tuple[float, float, float]:
    """Medians of both, taken in turns so that a slow moment of the machine meets both, and their ratio."""
    pairs = [(seconds((*AUTOBATCH, "--help")), seconds((sys.executable, "-c", "pass"))) for _ in range(REPEATS)]
    with_help, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    return with_help, bare, with_help / bare


def cold_probe() -> dict[str, float]:
    """Seconds of a whole probe, and how many of them a bare `import torch` takes."""
    importing = seconds((sys.executable, "-c", "import torch"))
    whole = seconds(PROBE)
    return {"probe": whole, "import_torch": importing, "rest": whole - importing}


def main() -> int:
    with_help, bare, ratio = help_ratio()
    figures = {"help": with_help, "bare_interpreter": bare, "ratio": ratio, **cold_probe()}
    sys.stdout.write(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=2) + "\n")
    sys.stdout.write(f"--help takes {ratio:.1f} times a bare interpreter; the bar is {BAR:g}\n")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
