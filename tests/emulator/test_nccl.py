"""Several emulated cards, several processes: torch's NCCL backend, DDP and FSDP2 run, and hold what they hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ScriptRunner, run_two_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emulator.conftest import OlderTorch

SCRIPT = Path(__file__).parent / "scripts" / "ranks.py"
WEIGHTS = 2 * 2048 * 4096 * 4


def run_ranks(
    scripts: ScriptRunner, folder: Path, python: str = sys.executable
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """What each of two ranks says, on cards of different sizes, and the calls that were missing."""
    with scripts.open("L4", "T4") as machine:
        run_two_ranks(machine, SCRIPT, str(folder), python=python)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], machine.unsupported_calls()


@pytest.fixture(scope="module")
def ranks(scripts: ScriptRunner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    answers, missing = run_ranks(scripts, tmp_path_factory.mktemp("ranks"))
    assert missing == ()
    return answers


def test_each_rank_has_a_card_of_its_own(ranks: list[dict[str, Any]]) -> None:
    """Cards of different sizes stand side by side."""
    assert [one["name"] for one in ranks] == ["NVIDIA L4", "Tesla T4"]


def test_collectives_leave_what_they_would_where_every_rank_held_the_same(ranks: list[dict[str, Any]]) -> None:
    """Nothing is moved, and nothing is summed; what frameworks compare between ranks agrees."""
    for rank, one in enumerate(ranks):
        assert one["reduced"] == [4]
        assert one["given"] == [7]
        assert one["listed"] == [[5], [5]]
        assert one["flat"] == [6, 6]
        assert one["part"] == [10 + rank]
        assert one["in_group"] == [3]


def test_communication_counts_what_torch_holds_for_it(ranks: list[dict[str, Any]]) -> None:
    """Weights, gradients, two moments and the optimizer's temporary one; a gradient bucket more under DDP; under FSDP2 half
    of it and, while they are needed, a layer's weights and gradients whole.
    """
    for one in ranks:
        peak = {wrap: held / WEIGHTS for wrap, held in one["peak"].items()}
        assert peak["none"] == pytest.approx(5, abs=0.05)
        assert peak["ddp"] == pytest.approx(6, abs=0.05)
        assert 2.5 < peak["fsdp2"] < 4


@pytest.mark.slow
def test_collectives_of_an_older_torch(older_torch: OlderTorch, tmp_path: Path) -> None:
    """CUDA 12, and what that torch imports of NCCL."""
    answers, missing = run_ranks(older_torch.scripts, tmp_path, older_torch.python)
    assert missing == ()
    assert [one["listed"] for one in answers] == [[[5], [5]]] * 2
