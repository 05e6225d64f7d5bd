"""The plan: exact where it says so, never above the maximum, in the fewest steps its split allows."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autobatch.errors import PlanError, UsageError
from autobatch.jsonform import from_json_form, to_json_form
from autobatch.plan import LARGEST_TARGET, Plan, make_plan

targets = st.integers(min_value=1, max_value=5000)
maxima = st.integers(min_value=1, max_value=400)
worlds = st.integers(min_value=1, max_value=9)
units = st.sampled_from([1, 2, 3, 8])
tolerances = st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5])
splits = st.sampled_from(["even", "balanced"])


def ranks_of(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """The sizes of every rank, listed or not."""
    return plan.rank_micro_batch_sizes or (plan.micro_batch_sizes,) * plan.world_size


def fewest_even_steps(target: int, most: int, world_size: int, unit: int, tolerance: float) -> int | None:
    """The fewest steps of any even plan, by trying every size and number of steps."""
    found = [
        steps
        for size in range(unit, most + 1, unit)
        for steps in range(1, 2 * target + 1)
        if abs(steps * size * world_size - target) <= tolerance * target + 1e-9
    ]
    return min(found, default=None)


def fewest_balanced_steps(target: int, most: int, world_size: int, unit: int) -> int | None:
    """The fewest steps at which every rank can fill every step with some allowed size, summing to the target."""
    if target % unit:
        return None
    for steps in range(1, target + 1):
        # With any sizes from `unit` to `most`, the sums over all slots are all multiples in this range.
        slots = steps * world_size
        if slots * unit <= target <= slots * (most // unit) * unit:
            return steps
    return None


@given(target=targets, most=maxima, world_size=worlds, unit=units, tolerance=tolerances, split=splits)
def test_every_plan_keeps_its_promises(
    target: int, most: int, world_size: int, unit: int, tolerance: float, split: str
) -> None:
    """Sums to its effective batch, exact or within tolerance; no size above the maximum; equal steps on all ranks."""
    assume(target >= world_size and most >= unit)
    try:
        plan = make_plan(
            target=target,
            max_micro_batch_size=most,
            world_size=world_size,
            multiple_of=unit,
            tolerance=tolerance,
            split=split,
        )
    except PlanError:
        assert unit > 1 or world_size > 1
        return
    sizes = [size for rank in ranks_of(plan) for size in rank]
    assert sum(sizes) == plan.effective_batch_size
    assert plan.exact == (sum(sizes) == target)
    assert plan.exact or (split == "even" and abs(sum(sizes) - target) <= tolerance * target + 1e-9)
    assert plan.exact or any("misses" in line for line in plan.warnings)
    assert max(sizes) <= most
    assert all(size >= 1 and size % unit == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= (unit if split == "balanced" else 0)
    assert {len(rank) for rank in ranks_of(plan)} == {plan.accumulation_steps}
    assert set(plan.confirmation_window) == set(sizes) or plan.accumulation_steps == 1
    assert sum(size / plan.effective_batch_size for size in sizes) == pytest.approx(1)


@given(
    target=st.integers(min_value=1, max_value=60),
    most=st.integers(min_value=1, max_value=25),
    world_size=st.integers(min_value=1, max_value=5),
    unit=st.sampled_from([1, 2, 3]),
    tolerance=tolerances,
)
def test_even_takes_the_fewest_steps(target: int, most: int, world_size: int, unit: int, tolerance: float) -> None:
    """Against brute force: a plan exists exactly where one is found, and with as few steps."""
    assume(target >= world_size and most >= unit)
    wanted = fewest_even_steps(target, most, world_size, unit, tolerance)
    question: dict[str, Any] = {
        "target": target,
        "max_micro_batch_size": most,
        "world_size": world_size,
        "multiple_of": unit,
    }
    if wanted is None:
        with pytest.raises(PlanError):
            make_plan(**question, tolerance=tolerance)
        return
    plan = make_plan(**question, tolerance=tolerance)
    assert plan.accumulation_steps == wanted
    misses = [abs(wanted * size * world_size - target) for size in range(unit, most + 1, unit)]
    assert abs(plan.effective_batch_size - target) == min(misses)


@given(
    target=st.integers(min_value=1, max_value=120),
    most=st.integers(min_value=1, max_value=40),
    world_size=st.integers(min_value=1, max_value=7),
    unit=units,
)
def test_balanced_takes_the_fewest_steps_possible(target: int, most: int, world_size: int, unit: int) -> None:
    """Against brute force over any sizes at all: balanced exists where any exact plan does, with as few steps."""
    assume(target >= world_size and most >= unit)
    wanted = fewest_balanced_steps(target, most, world_size, unit)
    question: dict[str, Any] = {
        "target": target,
        "max_micro_batch_size": most,
        "world_size": world_size,
        "multiple_of": unit,
    }
    if wanted is None:
        with pytest.raises(PlanError):
            make_plan(**question, split="balanced")
        return
    plan = make_plan(**question, split="balanced")
    assert plan.exact
    assert plan.accumulation_steps == wanted


@given(target=targets, most=maxima, world_size=worlds, unit=units)
def test_the_tolerance_that_an_error_names_works(target: int, most: int, world_size: int, unit: int) -> None:
    """Whatever way out a message names is followed and gives what it said."""
    assume(target >= world_size and most >= unit)
    question: dict[str, Any] = {"max_micro_batch_size": most, "world_size": world_size, "multiple_of": unit}
    try:
        message = " ".join(make_plan(target=target, **question).warnings)
    except PlanError as error:
        message = str(error)
    if "--tolerance" in message:
        words = message.split("--tolerance ")[1].split()
        plan = make_plan(target=target, **question, tolerance=words[0])
        assert [str(plan.effective_batch_size), str(plan.accumulation_steps)] == [words[2], words[4]]
    if "--split balanced" in message:
        plan = make_plan(target=target, **question, split="balanced")
        assert f"exactly in {plan.accumulation_steps} step" in message
    if "--target" in message:
        for word in message.split("--target ")[1].split(" can be")[0].split(" or "):
            assert make_plan(target=int(word), **question).exact


@given(target=targets, most=maxima, world_size=worlds, unit=units)
def test_the_target_that_a_balanced_error_names_works(target: int, most: int, world_size: int, unit: int) -> None:
    """The nearby targets of a balanced error can be balanced."""
    assume(target >= world_size and most >= unit)
    question: dict[str, Any] = {
        "max_micro_batch_size": most,
        "world_size": world_size,
        "multiple_of": unit,
        "split": "balanced",
    }
    try:
        make_plan(target=target, **question)
    except PlanError as error:
        for word in str(error).split("--target ")[1].split(" can be")[0].split(" or "):
            assert make_plan(target=int(word), **question).exact


@given(target=targets, most=maxima, world_size=worlds, split=splits)
def test_json_round_trip(target: int, most: int, world_size: int, split: str) -> None:
    """A plan comes back from its JSON as it was."""
    assume(target >= world_size)
    try:
        plan = make_plan(target=target, max_micro_batch_size=most, world_size=world_size, split=split)
    except PlanError:
        return
    assert from_json_form(Plan, json.loads(json.dumps(to_json_form(plan)))) == plan


def test_even_takes_the_largest_divisor() -> None:
    """256 with at most 97 is 4 times 64, silently."""
    plan = make_plan(target=256, max_micro_batch_size=97)
    assert plan.micro_batch_sizes == (64, 64, 64, 64)
    assert (plan.exact, plan.warnings, plan.rank_micro_batch_sizes) == (True, (), None)
    assert plan.weights == (0.25,) * 4


def test_balanced_takes_one_step_less() -> None:
    """256 with at most 97 is 86 + 85 + 85."""
    plan = make_plan(target=256, max_micro_batch_size=97, split="balanced")
    assert plan.micro_batch_sizes == (86, 85, 85)
    assert plan.weights == (86 / 256, 85 / 256, 85 / 256)


def test_ranks_that_differ_are_listed() -> None:
    """250 over 4 ranks: two of them take one sample more, all take as many steps."""
    plan = make_plan(target=250, max_micro_batch_size=32, world_size=4, split="balanced")
    assert plan.rank_micro_batch_sizes == ((32, 31), (32, 31), (31, 31), (31, 31))
    assert plan.micro_batch_sizes == (32, 31)


def test_the_maximum_above_the_share_means_no_accumulation() -> None:
    """One micro-batch of one rank's share, whatever more would fit."""
    for split in ("even", "balanced"):
        plan = make_plan(target=256, max_micro_batch_size=10**6, world_size=4, split=split)
        assert (plan.micro_batch_size, plan.accumulation_steps) == (64, 1)


@pytest.mark.parametrize(
    ("arguments", "window"),
    [
        ({"target": 64, "max_micro_batch_size": 64}, (64,)),
        ({"target": 256, "max_micro_batch_size": 64}, (64, 64)),
        ({"target": 256, "max_micro_batch_size": 97, "split": "balanced"}, (86, 85)),
        ({"target": 257, "max_micro_batch_size": 97, "split": "balanced"}, (85, 86)),
        ({"target": 7, "max_micro_batch_size": 2, "world_size": 2, "split": "balanced"}, (1, 2)),
        ({"target": 250, "max_micro_batch_size": 97, "world_size": 4, "split": "balanced"}, (63,)),
    ],
)
def test_the_confirmation_window_holds_gradients_where_training_does(
    arguments: dict[str, Any], window: tuple[int, ...]
) -> None:
    """The larger size comes second wherever any rank runs it while gradients are alive (86+86+85; 2+2 beside 2+1)."""
    assert make_plan(**arguments).confirmation_window == window


def test_a_prime_target_is_returned_with_a_warning() -> None:
    """257 under even is 257 times 1; the warning names balanced and the tolerance with what they give."""
    plan = make_plan(target=257, max_micro_batch_size=97)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.exact) == (1, 257, True)
    assert list(plan.warnings) == [
        (
            "target 257 under an even split takes 257 steps of 1 where 3 could do; --split balanced hits it exactly "
            "in 3 steps, --tolerance 0.39% allows 258 in 3 steps"
        )
    ]


def test_single_samples_are_warned_of_where_more_would_do() -> None:
    """3 with at most 2 is 3 times 1, and 2 + 1 is named."""
    plan = make_plan(target=3, max_micro_batch_size=2)
    assert plan.accumulation_steps == 3
    assert "--split balanced hits it exactly in 2 steps" in plan.warnings[0]


def test_a_small_maximum_alone_is_no_reason_to_warn() -> None:
    """Where no split does better, nothing is said."""
    assert make_plan(target=5, max_micro_batch_size=1).warnings == ()


def test_a_target_that_ranks_cannot_share_evenly() -> None:
    """The error names target and world size, what balanced gives, and the tolerance that would do."""
    with pytest.raises(PlanError) as caught:
        make_plan(target=250, max_micro_batch_size=97, world_size=4)
    assert str(caught.value) == (
        "target 250 is not divisible by world_size 4; --split balanced hits it exactly in 1 step, "
        "--tolerance 0.8% allows 252 in 1 step"
    )


def test_a_tolerance_too_small_is_named() -> None:
    """The error says how far the tolerance reached."""
    with pytest.raises(PlanError, match="not divisible by multiple_of 100, nor is anything within 2 of it"):
        make_plan(target=250, max_micro_batch_size=100, multiple_of=100, tolerance="1%")


def test_a_multiple_that_does_not_divide() -> None:
    """Both splits name the product or multiple that stands in the way."""
    with pytest.raises(PlanError, match=r"world_size 4 . multiple_of 8 = 32; --tolerance 2.4% allows 256"):
        make_plan(target=250, max_micro_batch_size=97, world_size=4, multiple_of=8)
    with pytest.raises(PlanError, match=r"target 250 is not a multiple of multiple_of 8.*--target 248 or 256 can"):
        make_plan(target=250, max_micro_batch_size=97, world_size=4, multiple_of=8, split="balanced")


def test_no_rank_gets_an_empty_micro_batch() -> None:
    """10 samples over 4 ranks, one at a time, would take 3 steps, and two ranks have 2 samples only."""
    with pytest.raises(PlanError, match=r"target 10 leaves a rank of world_size 4 less than .* --target 8 or 12 can"):
        make_plan(target=10, max_micro_batch_size=1, world_size=4, split="balanced")


def test_no_way_out_but_a_smaller_multiple() -> None:
    """Where no tolerance and no nearby target can help, the multiple itself is named."""
    with pytest.raises(PlanError, match="take --multiple-of 1 or less"):
        make_plan(target=3, max_micro_batch_size=8, world_size=2, multiple_of=8, dataset_size=10)


def test_tolerance_allows_a_miss_and_says_by_how_much() -> None:
    """0.8 % of 250 is exactly 2, in spite of floats; of two equal misses the larger batch is taken."""
    plan = make_plan(target=250, max_micro_batch_size=97, world_size=4, tolerance="0.8%")
    assert (plan.effective_batch_size, plan.exact) == (252, False)
    assert plan.warnings == ("effective batch 252 misses target 250 by 2 (0.8%)",)
    # 0.29 * 100 is below 29 in floats.
    assert make_plan(target=100, max_micro_batch_size=71, multiple_of=71, tolerance=0.29).effective_batch_size == 71


def test_an_exact_plan_is_preferred_at_equal_steps() -> None:
    """A tolerance never spoils a plan that hits the target in as few steps."""
    assert make_plan(target=256, max_micro_batch_size=64, tolerance="10%").exact
    assert make_plan(target=256, max_micro_batch_size=64, tolerance="25%").accumulation_steps == 3


def test_a_tolerance_stays_within_the_data_set() -> None:
    """A plan does not take more samples for one step than there are."""
    assert make_plan(target=251, max_micro_batch_size=97, tolerance="1%").effective_batch_size == 252
    capped = make_plan(target=251, max_micro_batch_size=97, tolerance="1%", dataset_size=251)
    assert capped.effective_batch_size == 249


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": 0}, "target 0 is below 1"),
        ({"target": -3}, "target -3 is below 1"),
        ({"target": True}, "target True is not a whole number"),
        ({"target": "12"}, "target '12' is not a whole number"),
        ({"target": 2.0}, "target 2.0 is not a whole number"),
        ({"target": LARGEST_TARGET + 1}, "target 1000000001 is above the largest, 1000000000"),
        ({"world_size": 0}, "world_size 0 is below 1"),
        ({"world_size": 300}, "target 256 is below world_size 300.*--target 300 or more, or --world-size 256 or less"),
        ({"multiple_of": 0}, "multiple_of 0 is below 1"),
        ({"multiple_of": 98}, "max_micro_batch_size 97 is below multiple_of 98"),
        ({"max_micro_batch_size": 0}, "max_micro_batch_size 0 is below 1"),
        ({"split": "uneven"}, "split 'uneven' is unknown; choose even or balanced"),
        ({"split": []}, "is unknown; choose even or balanced"),
        ({"tolerance": 1.0}, "tolerance 1.0 is outside 0 to 1"),
        ({"tolerance": "-1%"}, "tolerance '-1%' is not a share"),
        ({"dataset_size": 100}, "dataset_size 100 is below target 256.*--target 100 or less"),
        ({"dataset_size": 0}, "dataset_size 0 is below 1"),
    ],
)
@pytest.mark.parametrize("split", ["even", "balanced"])
def test_bad_arguments(arguments: dict[str, Any], words: str, split: str) -> None:
    """Each is a usage error of one line with the number given."""
    question: dict[str, Any] = {"target": 256, "max_micro_batch_size": 97, "split": split} | arguments
    with pytest.raises(UsageError, match=words) as caught:
        make_plan(**question)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["even", "balanced"])
@pytest.mark.parametrize("target", [10**6, 999_983])
def test_a_million_samples_take_no_time(target: int, split: str) -> None:
    """Also for a prime target, whose even plan lists a million micro-batches."""
    start = time.perf_counter()
    plan = make_plan(target=target, max_micro_batch_size=1000, split=split)
    assert plan.exact
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({"target": 999_999_937, "max_micro_batch_size": 97}, 999_999_937),
        ({"target": 10**9, "max_micro_batch_size": 1}, 10**9),
        ({"target": 10**9 - 1, "max_micro_batch_size": 10**9, "world_size": 10**8, "split": "balanced"}, 10**8),
    ],
)
def test_a_plan_too_long_to_list_is_refused_at_once(arguments: dict[str, Any], number: int) -> None:
    """No question makes a plan that fills the memory: it is refused before anything is listed."""
    start = time.perf_counter()
    with pytest.raises(PlanError, match=f"takes {number} micro-batches .* above the most that a plan lists, 1048576"):
        make_plan(**arguments)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulation_steps": 2}, "accumulation_steps 2"),
        ({"effective_batch_size": 257}, "not the sum"),
        ({"micro_batch_size": 85}, "not the largest"),
        ({"exact": False}, "exact is False"),
        ({"micro_batch_sizes": ()}, "at least 1"),
        ({"micro_batch_sizes": (86, 170, 0)}, "at least 1"),
        ({"target": 0}, "at least 1"),
        ({"split": "even"}, "no plan under split even"),
        ({"split": "odd"}, "split 'odd'"),
        ({"world_size": 2, "effective_batch_size": 512, "exact": False}, "no plan under split balanced"),
        ({"rank_micro_batch_sizes": ((86, 85, 85), (86, 85, 85))}, "2 ranks are listed for world_size 1"),
        ({"rank_micro_batch_sizes": ()}, "at least 1"),
        ({"rank_micro_batch_sizes": ((85, 86, 85),)}, "rank 0 differs"),
    ],
)
def test_a_plan_that_contradicts_itself_cannot_be_made(changes: dict[str, Any], words: str) -> None:
    """The invariants of the value hold however it is made."""
    plan = make_plan(target=256, max_micro_batch_size=97, split="balanced")
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(plan, **changes)


def test_ranks_are_left_out_of_the_json_where_they_are_equal() -> None:
    """`rank_micro_batch_sizes` is there when ranks differ, and only then."""
    same = to_json_form(make_plan(target=256, max_micro_batch_size=97))
    differ = to_json_form(make_plan(target=250, max_micro_batch_size=97, world_size=4, split="balanced"))
    assert isinstance(same, dict)
    assert isinstance(differ, dict)
    assert "rank_micro_batch_sizes" not in same
    assert differ["rank_micro_batch_sizes"] == [[63], [63], [62], [62]]
