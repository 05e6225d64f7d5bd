"""Plans of ranks that take sizes of their own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch import PlanError, UsageError, make_plan
from autobatch.rankplan import make_rank_plan


@given(
    most=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    unit=st.sampled_from([1, 2, 8]),
    units=st.integers(1, 2000),
)
def test_a_plan_is_exact_within_each_ranks_size_and_in_proportion(most: list[int], unit: int, units: int) -> None:
    """Fewest steps, the same on every rank; shares of what is above one unit a step differ from proportion by less than one."""
    ranks, fewest = len(most), -(-units // sum(most))
    sizes = [room * unit + unit - 1 for room in most]  # what is not a whole unit is no room
    if units * unit < ranks:
        return
    try:
        plan = make_rank_plan(target=units * unit, max_micro_batch_sizes=sizes, multiple_of=unit)
    except PlanError:
        assert units < fewest * ranks
        return
    windows = plan.rank_micro_batch_sizes or (plan.micro_batch_sizes,) * ranks
    assert sum(map(sum, windows)) == units * unit == plan.effective_batch_size
    assert plan.accumulation_steps == fewest
    more, room = units - fewest * ranks, [fewest * (one - 1) for one in most]
    for window, largest, own in zip(windows, sizes, room, strict=True):
        assert len(window) == fewest
        assert unit <= min(window) <= max(window) <= largest
        assert max(window) - min(window) <= unit
        assert not any(size % unit for size in window)
        assert abs(sum(window) / unit - fewest - more * own / max(1, sum(room))) < 1


@given(target=st.integers(1, 5000), most=st.integers(1, 64), ranks=st.integers(1, 5))
def test_equal_ranks_take_as_many_steps_as_a_balanced_plan(target: int, most: int, ranks: int) -> None:
    """Steps agree wherever both give a plan."""
    try:
        plan = make_plan(target=target, max_micro_batch_size=most, world_size=ranks, split="balanced")
        own = make_rank_plan(target=target, max_micro_batch_sizes=[most] * ranks)
    except (PlanError, UsageError):
        return
    assert own.accumulation_steps == plan.accumulation_steps
    assert own.micro_batch_size == plan.micro_batch_size


def test_each_rank_is_confirmed_by_a_window_of_its_own_sizes() -> None:
    """The larger size second where it runs after another micro-batch."""
    plan = make_rank_plan(target=256, max_micro_batch_sizes=[64, 32])
    assert plan.rank_micro_batch_sizes == ((57, 57, 57), (29, 28, 28))
    assert plan.rank_confirmation_windows == ((57, 57), (29, 28))
    once = make_rank_plan(target=90, max_micro_batch_sizes=[64, 32])
    assert once.rank_confirmation_windows == ((60,), (30,))
    assert make_plan(target=64, max_micro_batch_size=8, world_size=2).rank_confirmation_windows == ((8, 8),) * 2


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"max_micro_batch_sizes": []}, UsageError, r"max_micro_batch_sizes \[\] is not a list"),
        ({"max_micro_batch_sizes": 32}, UsageError, "max_micro_batch_sizes 32 is not a list"),
        ({"max_micro_batch_sizes": [4, 0]}, UsageError, r"max_micro_batch_sizes\[1\] 0 is below 1"),
        ({"max_micro_batch_sizes": [4, 8], "multiple_of": 8}, UsageError, r"\[0\] 4 is below multiple_of 8"),
        ({"target": 1}, UsageError, "target 1 is below world_size 2"),
        ({"target": 100, "dataset_size": 99}, UsageError, "dataset_size 99 is below target 100"),
        (
            {"target": 100, "multiple_of": 8},
            PlanError,
            "target 100 is not a multiple of multiple_of 8.*take --target 96 or 104",
        ),
        (
            {"target": 5, "max_micro_batch_sizes": [1, 1]},
            PlanError,
            "less than one micro-batch of 1 .* take --target 6",
        ),
        (
            {"target": 1_000_000_000, "max_micro_batch_sizes": [1, 1]},
            PlanError,
            "1000000000 micro-batches .*above the most",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_with_the_way_out(asked: dict[str, Any], error: type, message: str) -> None:
    """Both numbers, and what would do."""
    with pytest.raises(error, match=message):
        make_rank_plan(**{"target": 64, "max_micro_batch_sizes": [16, 8], **asked})
