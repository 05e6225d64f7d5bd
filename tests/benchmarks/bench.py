"""Run every benchmark of this folder, and keep what they found.

    python tests/benchmarks/bench.py [--quick] [--only NAME …] [--list]

Each runs in a process of its own; one that fails does not keep the others from running. Tables go to `results/` as Markdown and
JSON, pictures as SVG; `results/README.md` lists them. `--quick` runs the least of each and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from results import RESULTS, markdown_table

# What is timed comes first, then what takes long; all of it about an hour and a half on two cores.
BENCHMARKS = {
    "start_up": "how long the command line takes to start",
    "probe_share": "how much of a probe's time is not the training steps that it runs",
    "accumulator_overhead": "the accumulator against a loop by hand",
    "plan_rate": "the service's rate and latency",
    "store_scale": "the store as it grows",
    "search_cost": "sizes tried by a search, on recorded curves",
    "peers_on_curves": "the finders of others on recorded curves",
    "against_real": "emulated memory against published measurements of real cards",
    "peers_at_work": "the finders of others at work on emulated cards",
}


def run(name: str, folder: Path, *, quick: bool) -> tuple[int, float]:
    """Run one; gives its exit status and seconds."""
    began = time.monotonic()
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--write", "--into", str(folder)]
    ended = subprocess.run([*command, *(["--quick"] if quick else [])], check=False)
    return ended.returncode, time.monotonic() - began


def index() -> str:
    """What is kept, with the pictures."""
    rows = [
        (f"[{name}]({name}.md)", words, f"[JSON]({name}.json)")
        for name, words in BENCHMARKS.items()
        if (RESULTS / f"{name}.md").exists()
    ]
    pictures = [f"![{name}]({name}.svg)" for name in BENCHMARKS if (RESULTS / f"{name}.svg").exists()]
    head = (
        "# Results\n\nWritten by `make bench`. Every figure of memory is emulated, unless its table names a real card."
    )
    return "\n\n".join([head, markdown_table(("benchmark", "of what", "for machines"), rows), *pictures])


def main() -> int:
    """Run them; the exit status is 1 where one failed or missed a bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the least of each, and nothing is kept")
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(f"{name:<22}{words}" for name, words in BENCHMARKS.items()))
        return 0
    ended = {}
    with tempfile.TemporaryDirectory() as nowhere:
        for name in asked.only:
            print(f"\n==== {name}: {BENCHMARKS[name]}", flush=True)
            ended[name] = run(name, Path(nowhere) if asked.quick else RESULTS, quick=asked.quick)
    if not asked.quick:
        (RESULTS / "README.md").write_text(index() + "\n")
    summary = {name: {"status": status, "seconds": round(seconds)} for name, (status, seconds) in ended.items()}
    print(f"\n{json.dumps(summary, indent=1)}")
    return max((min(1, status) for status, _ in ended.values()), default=0)


if __name__ == "__main__":
    sys.exit(main())
