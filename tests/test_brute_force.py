"""The command line's answer is the maximum that brute force found: every size tried, with accumulation, at headroom 0."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from curves import FOLDER, recorded_curves

from autobatch.emulator.torchbuild import find_torch

ROOT = Path(__file__).parents[1]
CASES = [
    ("gpt2", "A100-SXM4-40GB"),
    *(
        pytest.param(workload, card, marks=pytest.mark.slow)
        for workload, cards in (
            ("gpt2", ("T4", "L4", "A40")),
            ("vit?image=512", ("T4", "RTX 3060", "L4", "RTX 4090")),
            ("resnet50?image=640", ("RTX 3060", "T4", "L4", "RTX 4090", "A10G")),
        )
        for card in cards
    ),
]


@pytest.mark.parametrize(("workload", "card"), CASES)
def test_the_maximum_equals_brute_force(workload: str, card: str):
    """The certificate's size is the largest of the recorded curve that fits below every size that does not."""
    sys.path.insert(0, str(Path(__file__).parent))
    from record_curves import slug

    name = f"{slug(workload)}-{slug(card)}-2"
    with gzip.open(FOLDER / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        recorded_with = json.load(file)["torch"]
    torch_build = find_torch()
    if torch_build is None or torch_build.version != recorded_with:
        pytest.skip(f"recorded with torch {recorded_with}, whose figures are its own; here is {torch_build}")
    curve = next(curve for curve in recorded_curves() if curve.name == name)

    command = ["probe", workload, "--target", "4096", "--emulate", card, "--headroom", "0", "--format", "json"]
    result = subprocess.run(
        [sys.executable, "-m", "autobatch", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["basis"] == "emulated"
    assert report["certified"]
    assert report["memory"]["budget_bytes"] == curve.budget_bytes
    assert report["max_micro_batch_size"] == curve.true_maximum(4096)
    assert report["smallest_failing"] == report["max_micro_batch_size"] + 1
