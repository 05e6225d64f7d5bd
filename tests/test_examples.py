"""The examples of accumulation run, and show what their first lines claim."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import ScriptRunner

EXAMPLES = Path(__file__).parent / "examples"


def figures(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


@pytest.mark.slow  # 500 epochs, five times
def test_linear_regression_is_the_same_whole_and_accumulated() -> None:
    """Weights after 500 epochs agree to 1e-12, by hand and by the accumulator, and are the true ones."""
    learned = figures("linear_regression")
    assert learned["64 by hand"] == pytest.approx(learned["64 whole"], rel=1e-12)
    assert learned["64 accumulated"] == pytest.approx(learned["64 whole"], rel=1e-12)
    assert learned["32 accumulated"] == pytest.approx(learned["32 whole"], rel=1e-12)
    for weights in learned.values():
        assert weights == pytest.approx([5, 10, 1], abs=1e-9)


def test_gradients_never_cleared_grow() -> None:
    """Cleared gradients are those of each sample; never cleared ones add up; the accumulator clears them."""
    gradients = figures("one_sample_at_a_time")
    assert gradients["accumulator"] == gradients["cleared"]
    assert gradients["cleared"][0] == -4  # 2 · (0 − 2) · 1
    kept = [abs(value) for value in gradients["never cleared"]]
    assert kept == sorted(kept)
    assert kept[2] > 1.5 * abs(gradients["cleared"][2])


def test_an_incomplete_window_is_weighted_by_what_it_holds() -> None:
    """Of y = 2x the gradients are −4·mean(x²) and −4·Σx²; a fixed division halves the last window, none doubles the first."""
    gradients = figures("incomplete_window")
    assert gradients["mean wanted"] == [-30, -100]
    assert gradients["mean accumulated"] == pytest.approx([-30, -100], rel=1e-14)
    assert gradients["mean divided by the steps"] == [-30, -50]
    assert gradients["mean undivided"] == [-60, -100]
    assert gradients["sum wanted"] == gradients["sum accumulated"] == [-120, -100]


def test_evaluation_between_updates_sees_no_gradient() -> None:
    """Twelve updates of four micro-batches: evaluated after each third, where nothing is held."""
    seen = figures("evaluation_between_updates")
    assert seen["evaluated_at"] == [3, 6, 9, 12]
    assert seen["held_gradients"] == 0
    assert seen["boundaries"] == [False, False, False, True] * 12


def test_ten_steps_of_100_are_one_update_on_1000() -> None:
    """One update an epoch, equal to that of the full batch."""
    run = figures("whole_data_set")
    assert run["steps_per_update"] == 10
    assert run["updates"] == 5
    assert run["difference"] <= 1e-12


@pytest.fixture(scope="module")
def rates() -> Any:
    return figures("learning_rates")


class TestLearningRates:
    """`learning_rates` in its parts."""

    def test_warm_up_then_decay(self, rates: Any) -> None:
        """Every micro-batch of an update sees one rate; the peak comes after the warm-up, and 0 after the last update."""
        *updates, after = rates["warm_up"]
        assert all(len(seen) == 4 and len(set(seen)) == 1 for seen in updates)
        by_update = [seen[0] for seen in updates]
        assert by_update[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
        assert by_update[-1] == pytest.approx(0.1 / 8)
        assert after == [0]

    def test_plateau(self, rates: Any) -> None:
        """An improvement under the threshold is none; reduced after more than `patience`; never under `min_lr`."""
        assert rates["plateau"] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001, 0.001])

    def test_set_by_hand_and_resumed(self, rates: Any) -> None:
        """A rate set in `param_groups` holds in the resumed run, whose weights are the uninterrupted run's, bit by bit."""
        assert rates["by_hand"] == {"rates": [0.025] * 4, "steps": 3, "equal": True}


def test_a_run_that_ran_out_of_memory_ends_with_the_same_weights() -> None:
    """The window is done again in twos; later ones stay so; no sample is lost and none counted twice."""
    run = figures("out_of_memory")
    assert run["sizes"] == [(2,) * 8] * 3
    assert run["events"] == [(0, 4, 2)]
    assert (run["steps"], run["samples"]) == (3, 48)
    assert run["difference"] <= 1e-12


@pytest.mark.slow
def test_a_language_model_on_two_ranks_equals_one_process() -> None:
    """Token weights give the full batch's gradient on both ranks; equal weights are far from it."""
    ranks = figures("language_model_on_two_ranks")
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["token-weighted"] <= 1e-12
        assert rank["unweighted"] > 0.05


def test_a_card_that_runs_out_of_memory(scripts: ScriptRunner) -> None:
    """The allocator's own error on an emulated card: halved until it fits, with every step and sample."""
    run = scripts.run(EXAMPLES / "out_of_memory_on_a_card.py", ["A100-SXM4-40GB"]).answer
    assert run["events"] == [[8, 4], [4, 2]]
    assert "out of memory" in run["message"]
    assert run["sizes"] == [[2] * 32] * 3
    assert (run["steps"], run["samples"]) == (3, 192)
