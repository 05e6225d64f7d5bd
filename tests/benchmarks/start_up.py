"""How long the command line takes to start: `--help` against a bare interpreter, and a cold emulated probe.

    python tests/benchmarks/start_up.py [--quick] [--write]

The bar for the ratio is 20, for the probe 20 s on two cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from results import Result, machine, markdown_table, run_benchmark

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}
REPEATS = 15
BAR = 20.0

AUTOBATCH = (sys.executable, "-m", "autobatch")
PROBE = (
    *AUTOBATCH,
    "probe",
    "gpt2",
    "--target",
    "256",
    "--emulate",
    "A100-SXM4-40GB",
    "--no-cache",
    "--format",
    "json",
)


def seconds(command: tuple[str, ...]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def help_ratio(repeats: int) -> tuple[float, float, float]:
    """Medians of both, taken in turns so that a slow moment of the machine meets both, and their ratio."""
    pairs = [(seconds((*AUTOBATCH, "--help")), seconds((sys.executable, "-c", "pass"))) for _ in range(repeats)]
    with_help, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    return with_help, bare, with_help / bare


def cold_probe() -> dict[str, float]:
    """Seconds of a whole probe, and how many of them a bare `import torch` takes."""
    importing = seconds((sys.executable, "-c", "import torch"))
    whole = seconds(PROBE)
    return {"probe": whole, "import_torch": importing, "rest": whole - importing}


def measure(*, quick: bool) -> Result:
    """Time both."""
    with_help, bare, ratio = help_ratio(2 if quick else REPEATS)
    figures = {"help": with_help, "bare_interpreter": bare, "ratio": ratio, **({} if quick else cold_probe())}
    named = {
        "help": "`autobatch --help` (s)",
        "bare_interpreter": "`python -c pass` (s)",
        "ratio": "ratio of the two",
        "probe": "a cold emulated probe of `gpt2` (s)",
        "import_torch": "`import torch` alone (s)",
        "rest": "the probe without that (s)",
    }
    rows = [(named[name], f"{value:.3g}") for name, value in figures.items()]
    text = f"# Start\n\n{machine()}. The bar for the ratio is {BAR:g}.\n\n{markdown_table(('', ''), rows)}"
    misses = (
        () if ratio <= BAR or quick else (f"--help takes {ratio:.1f} times a bare interpreter, the bar is {BAR:g}",)
    )
    data = {"machine": machine(), "bar": BAR, **{name: round(value, 3) for name, value in figures.items()}}
    return Result(name="start_up", data=data, text=text, misses=misses)


if __name__ == "__main__":
    sys.exit(run_benchmark(measure, __doc__))
