"""Record memory curves on emulated cards by brute force: every size, until eight in a row have failed.

    python tests/record_curves.py                       the standard set, leaving what is there already
    python tests/record_curves.py T4 'gpt2?layers=6'    one card and one workload

Each curve is a file under tests/data/curves: what every size did, with and without accumulation. The test of the search
replays them. A size takes about a second, so the standard set takes most of an hour.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "curves"
CARDS = ("RTX 3060", "T4", "L4", "RTX 4090", "A100-SXM4-40GB", "A40")
WORKLOADS = ("gpt2", "vit?image=512", "resnet50?image=640")
MORE = (
    ("H100-80GB", "gpt2"),
    ("A10G", "resnet50?image=640"),
    ("A100-SXM4-40GB", "gpt2?layers=24&width=1024&heads=16"),
    ("A100-SXM4-40GB", "vit?image=384"),
    ("A100-SXM4-40GB", "resnet50?image=448"),
    ("T4", "vit"),
    ("RTX 3060", "gpt2?seq_len=256"),
)
FAILS_IN_A_ROW = 8
COLUMNS = (
    "micro_batch_size",
    "outcome",
    "steps",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "footprint_bytes",
    "alloc_retries",
    "held_bytes",
    "largest_segment_bytes",
    "oom_request_bytes",
)


def main() -> None:
    """Record what is asked for, each card and workload in a process of its own."""
    from autobatch.emulator.launch import open_machine

    pairs = [(sys.argv[1], sys.argv[2])] if len(sys.argv) > 2 else [*[(c, w) for w in WORKLOADS for c in CARDS], *MORE]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for card, workload in pairs:
        for steps in (2, 1):
            path = FOLDER / f"{slug(workload)}-{slug(card)}-{steps}.json.gz"
            if path.exists():
                continue
            with open_machine([card]) as machine:
                command = [sys.executable, __file__, "--child", card, workload, str(steps), str(path)]
                subprocess.run(command, env=machine.environment(), check=True)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def record(card: str, workload: str, steps: int, path: Path) -> None:
    """Record one curve in this process, which runs on the emulated card."""
    import torch

    from autobatch.gpu.opening import open_device
    from autobatch.options import ProbeOptions
    from autobatch.workload.loader import WorkloadName, load_factory, make_job
    from autobatch.workload.running import TrialRunner

    name = WorkloadName.parse(workload)
    factory = load_factory(name)
    rows: list[list[object]] = []
    with open_device(ProbeOptions(target=1, headroom=0)) as device:
        runner = TrialRunner(lambda: make_job(name, factory), device.memory, timed=False)
        failed = 0
        while failed < FAILS_IN_A_ROW:
            trial = runner((len(rows) + 1,) * steps)
            failed = 0 if trial.fits else failed + 1
            rows.append([getattr(trial, column) for column in COLUMNS])
        content = {
            "basis": device.facts.basis,
            "workload": workload,
            "card": card,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "budget_bytes": device.facts.memory.budget_bytes,
            "micro_batches_per_step": steps,
            "columns": COLUMNS,
            "rows": rows,
        }
    # Written aside first: a file that is there is whole. No time in it, so that the same figures give the same bytes.
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0))
    temporary.rename(path)
    fitting = [row[0] for row in rows if row[1] == "fits"]
    sys.stderr.write(f"{path.name}: {len(rows)} sizes, the largest that fits is {max(fitting, default=None)}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        record(sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
    else:
        main()
