"""The options: every bad value is one clear line, and what follows from good ones is right."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import typing

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autobatch.errors import PlanError, UsageError
from autobatch.jsonform import from_json_form, to_json_form
from autobatch.options import OBJECTIVES, ProbeOptions
from autobatch.plan import SPLITS


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target": 0}, "target 0 is below 1"),
        ({"target": -256}, "target -256 is below 1"),
        ({"target": "256"}, "target '256' is not a whole number"),
        ({"target": True}, "target True is not a whole number"),
        ({"target": 256.0}, "target 256.0 is not a whole number"),
        ({"target": None}, "target None is not a whole number"),
        ({"target": 10**10}, "target 10000000000 is above the largest, 1000000000"),
        ({"world_size": 0}, "world_size 0 is below 1"),
        ({"world_size": "8"}, "world_size '8' is not a whole number"),
        ({"target": 3, "world_size": 4}, "target 3 is below world_size 4.*--target 4 or more, or --world-size 3"),
        ({"multiple_of": 0}, "multiple_of 0 is below 1"),
        ({"multiple_of": 65, "world_size": 4}, "multiple_of 65 is above the 64 samples that each of 4 .*target 256"),
        ({"multiple_of": 8, "max_micro_batch": 7}, "max_micro_batch 7 is below multiple_of 8.*--max-micro-batch 8"),
        ({"max_micro_batch": 0}, "max_micro_batch 0 is below 1"),
        ({"max_micro_batch": 1.5}, "max_micro_batch 1.5 is not a whole number"),
        ({"split": "uneven"}, "split 'uneven' is unknown; choose even or balanced"),
        ({"objective": "fast"}, "objective 'fast' is unknown; choose max, plan, throughput"),
        ({"objective": []}, "is unknown; choose"),
        ({"dataset_size": 255}, "dataset_size 255 is below target 256.*--target 255 or less"),
        ({"dataset_size": "255"}, "dataset_size '255' is not a whole number"),
        ({"min_windows": 2}, "min_windows 2 is below 3"),
        ({"min_windows": None}, "min_windows None is not a whole number"),
        ({"tolerance": "100%"}, "tolerance '100%' is outside 0 to 1"),
        ({"tolerance": float("nan")}, "tolerance nan is outside 0 to 1"),
        ({"tolerance": True}, "tolerance True is not a share"),
        ({"headroom": "much"}, "headroom 'much' is not a number of bytes.*'3%'"),
        ({"headroom": "100%"}, "headroom '100%' is outside 0 to 1"),
        ({"headroom": -1}, "headroom -1 is negative"),
        ({"headroom": 0.02}, "headroom 0.02 is neither bytes nor a percentage"),
        ({"headroom": True}, "headroom True is not a number of bytes"),
        ({"memory_limit": "24 gigs"}, "memory_limit '24 gigs' has an unknown unit 'gigs'"),
        ({"headroom": "3"}, "headroom '3' is 3 bytes: write 3GiB.*'3%'"),
        ({"memory_limit": "24"}, "memory_limit '24' is 24 bytes: write 24GiB"),
        ({"tenant": "4", "emulate": "T4"}, "tenant '4' is 4 bytes: write 4GiB"),
        ({"headroom": "5GiB", "memory_limit": "4GiB"}, "'5GiB' is 5 GiB and leaves nothing of memory_limit 4 GiB"),
        ({"headroom": 5, "memory_limit": 4}, "headroom 5 is 5 B and leaves nothing of memory_limit 4 B"),
        ({"memory_limit": 0}, "memory_limit 0 leaves no memory"),
        ({"memory_limit": 2.5}, "memory_limit 2.5 is not a number of bytes"),
        ({"tenant": "4GiB"}, "tenant '4GiB' stands beside the job on an emulated card only.*--emulate"),
        ({"tenant": "4GiX", "emulate": "T4"}, "tenant '4GiX' has an unknown unit"),
        ({"device": ""}, "device '' is not the name of a device"),
        ({"device": 0}, "device 0 is not the name of a device"),
        ({"emulate": " "}, "emulate ' ' is not the name of a card"),
        ({"emulate": True}, "emulate True is not the name of a card"),
        ({"trial_timeout": 0}, "trial_timeout 0 is not above 0"),
        ({"trial_timeout": float("nan")}, "trial_timeout nan is not above 0"),
        ({"trial_timeout": "60"}, "trial_timeout '60' is not a number of seconds"),
        ({"deadline": -1}, "deadline -1 is not above 0"),
        ({"deadline": float("inf")}, "deadline inf is not above 0 and finite"),
        ({"deadline": 10**400}, "deadline 1000.* is not above 0 and finite"),
        ({"deadline": True}, "deadline True is not a number of seconds"),
    ],
)
def test_bad_values_are_usage_errors(values: dict[str, object], words: str) -> None:
    """Each names the field and the value given, in one line."""
    with pytest.raises(UsageError, match=words) as caught:
        ProbeOptions(**({"target": 256} | values))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_text_becomes_numbers() -> None:
    """Sizes and shares are numbers once the options are made; headroom waits for the card."""
    options = ProbeOptions(
        target=256, memory_limit="24GiB", tolerance="1%", emulate="T4", tenant="4GiB", headroom="3%", deadline=60
    )
    assert (options.memory_limit, options.memory_limit_bytes) == (24 * 2**30, 24 * 2**30)
    assert (options.tolerance, options.tolerance_fraction) == (0.01, 0.01)
    assert (options.tenant, options.tenant_bytes) == (4 * 2**30, 4 * 2**30)
    assert (options.headroom, options.headroom_bytes(1000)) == ("3%", 30)
    assert isinstance(options.deadline, float)


def test_defaults() -> None:
    """What a probe does when only the target is given."""
    options = ProbeOptions(target=256)
    assert (options.split, options.objective, options.multiple_of, options.min_windows) == ("even", "max", 1, 3)
    assert (options.tolerance, options.headroom, options.memory_limit_bytes, options.tenant_bytes) == (0, "2%", None, 0)
    assert (options.trial_timeout, options.deadline) == (600, None)


def test_headroom_above_the_card_names_both() -> None:
    """A headroom is resolved against the card, and refused where nothing is left of it."""
    with pytest.raises(UsageError, match=r"headroom '24GiB' is 24 GiB .* 16 GiB"):
        ProbeOptions(target=1, headroom="24GiB").headroom_bytes(16 * 2**30)


def test_headroom_is_of_the_card_that_is_stood_in_for() -> None:
    """A percentage is of the limit where that is less than the card, and of the card where it is more."""
    options = ProbeOptions(target=1, headroom="10%", memory_limit=1000)
    assert [options.headroom_bytes(total) for total in (500, 1000, 4000)] == [50, 100, 100]


@pytest.mark.parametrize(
    ("values", "can"),
    [
        ({"target": 257}, True),
        ({"target": 257, "split": "balanced"}, True),
        ({"target": 250, "split": "balanced", "world_size": 4}, False),
        ({"target": 256, "split": "balanced", "world_size": 4, "multiple_of": 32}, True),
        ({"target": 288, "split": "balanced", "world_size": 4, "multiple_of": 32}, False),
    ],
)
def test_whether_one_size_can_say_the_plan(values: dict[str, typing.Any], can: bool) -> None:
    """Known before anything runs only where the ranks' shares differ: then no size makes them equal."""
    options = ProbeOptions(**values)
    assert options.can_be_one_size is can
    found = []
    for size in range(options.multiple_of, options.share + 1):
        with contextlib.suppress(PlanError):  # some sizes leave a rank too little for every step
            found.append(len(options.make_plan(size).sizes))
    assert (1 in found) is can
    assert found


@pytest.mark.parametrize(
    ("values", "share", "ceiling"),
    [
        ({"target": 256}, 256, 256),
        ({"target": 250, "world_size": 4}, 63, 63),
        ({"target": 256, "max_micro_batch": 100}, 256, 100),
        ({"target": 256, "max_micro_batch": 1000}, 256, 256),
        ({"target": 250, "world_size": 4, "multiple_of": 8}, 63, 56),
        ({"target": 256, "max_micro_batch": 31, "multiple_of": 8}, 256, 24),
        ({"target": 24, "world_size": 2, "multiple_of": 8, "split": "balanced"}, 16, 16),
        ({"target": 24, "world_size": 2, "multiple_of": 8, "split": "even"}, 12, 8),
        ({"target": 25, "world_size": 2, "multiple_of": 8, "split": "balanced"}, 13, 8),
    ],
)
def test_share_and_ceiling(values: dict[str, typing.Any], share: int, ceiling: int) -> None:
    """The ceiling is one rank's share or the size given, in whole multiples; a balanced rank may take one more."""
    options = ProbeOptions(**values)
    assert (options.share, options.ceiling) == (share, ceiling)


def test_micro_batches_per_step() -> None:
    """Two where training accumulates, one where a size takes the whole share."""
    options = ProbeOptions(target=256, world_size=4)
    assert [options.micro_batches_per_step(n) for n in (1, 32, 63, 64, 65)] == [2, 2, 2, 1, 1]
    with pytest.raises(UsageError, match="micro_batch_size 0 is below 1"):
        options.micro_batches_per_step(0)


def test_candidates_of_max_are_all_sizes() -> None:
    """Every multiple up to the ceiling, without listing them."""
    assert ProbeOptions(target=250, world_size=4, multiple_of=8).candidates() == range(8, 57, 8)
    assert len(ProbeOptions(target=10**9, objective="throughput").candidates()) == 10**9


@given(
    target=st.integers(min_value=1, max_value=3000),
    world_size=st.integers(min_value=1, max_value=9),
    unit=st.integers(min_value=1, max_value=9),
    most=st.integers(min_value=9, max_value=3000),
    split=st.sampled_from(["even", "balanced"]),
)
def test_candidates_of_plan_are_where_steps_change(
    target: int, world_size: int, unit: int, most: int, split: typing.Literal["even", "balanced"]
) -> None:
    """Against the definition: ⌈share / k⌉ for every k, rounded up to the multiple, up to the ceiling."""
    assume(target >= world_size and unit <= target // world_size)
    options = ProbeOptions(
        target=target, world_size=world_size, multiple_of=unit, max_micro_batch=most, objective="plan", split=split
    )
    share = options.share
    sizes = {math.ceil(math.ceil(share / k) / unit) * unit for k in range(1, share + 1)}
    assert list(options.candidates()) == sorted(size for size in sizes if size <= options.ceiling)
    assert options.candidates()


@given(
    target=st.integers(min_value=1, max_value=500),
    world_size=st.integers(min_value=1, max_value=9),
    unit=st.integers(min_value=1, max_value=9),
    split=st.sampled_from(["even", "balanced"]),
    data=st.data(),
)
def test_the_ceiling_misses_no_plan(
    target: int, world_size: int, unit: int, split: typing.Literal["even", "balanced"], data: st.DataObject
) -> None:
    """A size above the ceiling gives no plan that the ceiling does not, and an even plan exists for all or none."""
    assume(target >= world_size and unit <= target // world_size)
    options = ProbeOptions(target=target, world_size=world_size, multiple_of=unit, split=split)
    try:
        plan = options.make_plan(target + unit)
    except PlanError:
        with pytest.raises(PlanError):
            options.make_plan(options.ceiling)
        return
    assert options.make_plan(options.ceiling) == plan
    if split == "even":
        smaller = data.draw(st.integers(min_value=unit, max_value=options.ceiling))
        assert options.make_plan(smaller).exact


def test_make_plan_passes_every_option_on() -> None:
    """The plan is the one of these options."""
    options = ProbeOptions(target=251, world_size=2, multiple_of=2, tolerance="5%", dataset_size=251)
    plan = options.make_plan(50)
    # 3 steps of 42 on 2 ranks, 252 samples, would be nearest; the data set has 251.
    assert (plan.target, plan.world_size, plan.micro_batch_size, plan.accumulation_steps) == (251, 2, 40, 3)
    assert ProbeOptions(target=256, split="balanced").make_plan(97).micro_batch_sizes == (86, 85, 85)


def test_every_field_says_what_it_is() -> None:
    """Each field has a docstring, help for a reader, and its choices where they are closed."""
    fields = dataclasses.fields(ProbeOptions)
    body = ast.parse(inspect.getsource(ProbeOptions)).body[0].body  # type: ignore[attr-defined]
    documented = [
        node.target.id
        for node, following in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    ]
    assert documented == [field.name for field in fields]
    assert all(field.metadata["help"] and field.metadata["form"] for field in fields)
    choices = {field.name: field.metadata["choices"] for field in fields if field.metadata["choices"]}
    assert choices == {"split": SPLITS, "objective": OBJECTIVES}


@given(
    target=st.integers(min_value=8, max_value=10**9),
    headroom=st.sampled_from(["2%", "512MiB", 0, 4096]),
    memory_limit=st.none() | st.integers(min_value=1, max_value=2**40),
    tolerance=st.floats(min_value=0, max_value=0.99),
    deadline=st.none() | st.floats(min_value=0.1, max_value=1e6),
)
def test_json_round_trip(
    target: int, headroom: str | int, memory_limit: int | None, tolerance: float, deadline: float | None
) -> None:
    """Options come back from their JSON as they were."""
    assume(memory_limit is None or memory_limit > 2**30)  # a headroom above the limit is refused
    options = ProbeOptions(
        target=target, headroom=headroom, memory_limit=memory_limit, tolerance=tolerance, deadline=deadline
    )
    assert from_json_form(ProbeOptions, json.loads(json.dumps(to_json_form(options)))) == options
