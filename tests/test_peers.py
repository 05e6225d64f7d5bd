"""The comparison with others' finders: it runs, and it can tell a wrong answer."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from curves import recorded_curves

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/benchmarks/peers_on_curves.py"
RESULTS = ROOT / "tests/benchmarks/results"
CARDS = ("gpt2-l4", "gpt2-t4")


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    """The benchmark's module."""
    spec = importlib.util.spec_from_file_location("peers_on_curves", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs(peers: ModuleType) -> list[Any]:
    """Two jobs, of which one trains at 7 samples under accumulation and at 8 without."""
    found: list[Any] = [pair for pair in peers.pairs_of(recorded_curves()) if pair[1].name[:-2] in CARDS]
    assert [pair[1].name[:-2] for pair in found] == list(CARDS)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lightning", [False, True])
def test_ours_is_exact_and_others_are_driven_to_real_errors(
    peers: ModuleType, pairs: list[Any], *, lightning: bool
) -> None:
    """Each ran the sizes that it is known to run; one whose answer only fits without accumulation is told."""
    asked = [finder for finder in peers.finders() if lightning or "Lightning" not in finder.name]
    rows = {finder.name.split()[0]: peers.compare(finder, pairs) for finder in asked}
    assert len(rows) == (4 if lightning else 3)
    assert (rows["autobatch"].exact, rows["autobatch"].does_not_train) == (2, 0)
    assert rows["accelerate"].does_not_train == 1  # 8 on the T4
    assert all(row.median_ooms >= 1 for row in rows.values())
    assert rows["timm"].worst_share < 1


def test_a_finder_that_answers_anything_is_found_out(peers: ModuleType, pairs: list[Any]) -> None:
    """Too much, and nothing at all."""
    for answer in (1000, 0):
        finder = peers.Finder(name="x", find=lambda step, answer=answer: [step(2), answer][1])
        row = peers.compare(finder, pairs)
        assert (row.exact, row.does_not_train, row.median_share) == (0, 2, 0.0)


def test_what_was_written_is_what_the_figures_say(peers: ModuleType) -> None:
    """As JSON for machines, as Markdown for people."""
    rows = [peers.Row(**form) for form in json.loads((RESULTS / "peers_on_curves.json").read_text())]
    assert (RESULTS / "peers_on_curves.md").read_text().strip().endswith(peers.table(rows))
