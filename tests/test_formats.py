"""The forms that shells read: they say every size of a plan, and never one that it does not have."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from autobatch.errors import PlanError
from autobatch.options import ProbeOptions
from autobatch.present.formats import check_form, plan_as_arguments, plan_as_environment, sizes_note

if TYPE_CHECKING:
    from autobatch.plan import Plan

ONE_SIZE = ProbeOptions(target=256).make_plan(97)
MIXED = ProbeOptions(target=256, split="balanced").make_plan(97)
RANKS = ProbeOptions(target=513, world_size=2, split="balanced").make_plan(97)
INEXACT = ProbeOptions(target=257, tolerance="1%").make_plan(97)


def variables(text: str) -> dict[str, str | None]:
    """What a shell has after evaluating the lines; None for what is unset."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        verb, _, rest = line.partition(" ")
        name, _, value = rest.partition("=")
        assert verb in {"export", "unset"}
        assert (verb == "export") == ("=" in rest)
        found[name] = value.strip("'") if verb == "export" else None
    return found


def sizes_told(values: dict[str, str | None], world_size: int) -> list[list[int]]:
    """Every rank's sizes as a job would read them off its environment."""
    per_rank, all_ranks = values["AUTOBATCH_RANK_MICRO_BATCH_SIZES"], values["AUTOBATCH_MICRO_BATCH_SIZES"]
    assert (per_rank is None) != (all_ranks is None)
    rows = per_rank.split(";") if per_rank is not None else [all_ranks or ""] * world_size
    return [[int(size) for size in row.split(",")] for row in rows]


def test_one_size_is_told_in_every_way() -> None:
    """Where one number says the plan, it is there beside the list of sizes, and the basis where it is known."""
    values = variables(plan_as_environment(ONE_SIZE, basis="emulated"))
    assert values == {
        "AUTOBATCH_BASIS": "emulated",
        "AUTOBATCH_MEASUREMENT": None,
        "AUTOBATCH_TARGET": "256",
        "AUTOBATCH_WORLD_SIZE": "1",
        "AUTOBATCH_EFFECTIVE_BATCH_SIZE": "256",
        "AUTOBATCH_EXACT": "1",
        "AUTOBATCH_ACCUMULATION_STEPS": "4",
        "AUTOBATCH_MICRO_BATCH_SIZE": "64",
        "AUTOBATCH_MICRO_BATCH_SIZES": "64,64,64,64",
        "AUTOBATCH_RANK_MICRO_BATCH_SIZES": None,
    }
    assert sizes_note(ONE_SIZE) == ""


def test_sizes_that_differ_have_no_one_number() -> None:
    """86+85+85 is no 3 × 86: the number is unset, the list is there, and the note says which."""
    values = variables(plan_as_environment(MIXED))
    assert values["AUTOBATCH_MICRO_BATCH_SIZE"] is None
    assert values["AUTOBATCH_MICRO_BATCH_SIZES"] == "86,85,85"
    assert values["AUTOBATCH_BASIS"] is None
    assert "86 and 85" in sizes_note(MIXED)
    assert "AUTOBATCH_MICRO_BATCH_SIZES lists" in sizes_note(MIXED)


def test_ranks_that_differ_are_listed_each() -> None:
    """No list speaks for all ranks then: it would be wrong on most of them."""
    values = variables(plan_as_environment(RANKS))
    assert values["AUTOBATCH_RANK_MICRO_BATCH_SIZES"] == "86,86,85;86,85,85"
    assert values["AUTOBATCH_MICRO_BATCH_SIZES"] is None
    assert values["AUTOBATCH_MICRO_BATCH_SIZE"] is None
    assert "AUTOBATCH_RANK_MICRO_BATCH_SIZES lists" in sizes_note(RANKS)


def test_a_miss_is_told() -> None:
    """An even plan within a tolerance says that it is not exact."""
    values = variables(plan_as_environment(INEXACT))
    assert values["AUTOBATCH_EXACT"] == "0"
    assert (values["AUTOBATCH_TARGET"], values["AUTOBATCH_EFFECTIVE_BATCH_SIZE"]) == ("257", "258")


def test_a_shell_evaluates_it_over_an_older_plan() -> None:
    """Values of a plan before are gone where the new one has none, also in a shell that stops at every error."""
    script = f"{plan_as_environment(ONE_SIZE)}\n{plan_as_environment(RANKS, basis='measured')}\n"
    script += 'echo "${AUTOBATCH_MICRO_BATCH_SIZE-none} ${AUTOBATCH_MICRO_BATCH_SIZES-none}"\n'
    script += "sh -c 'echo \"$AUTOBATCH_RANK_MICRO_BATCH_SIZES $AUTOBATCH_BASIS\"'"
    ended = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "none none\n86,86,85;86,85,85 measured\n"


def test_a_list_too_long_for_a_program_is_refused() -> None:
    """After an `eval` of it every command would fail with "Argument list too long"."""
    longest = ProbeOptions(target=65_521).make_plan(1)  # its 131,041 characters still pass
    text = plan_as_environment(longest)
    assert (
        subprocess.run(["bash", "-ec", "source /dev/stdin; env true"], input=text, text=True, check=False).returncode
        == 0
    )
    with pytest.raises(
        PlanError, match=r"MICRO_BATCH_SIZES would have \d+ characters, above the 131071.*--format json"
    ):
        plan_as_environment(ProbeOptions(target=65_600).make_plan(1))


def test_arguments_name_one_size() -> None:
    """What fits on a command line is one size and the steps."""
    assert plan_as_arguments(ONE_SIZE) == "--micro-batch-size 64 --accumulation-steps 4"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("args:hf", "--per_device_train_batch_size 64 --gradient_accumulation_steps 4"),
        ("args:lightning", "--data.batch_size 64 --trainer.accumulate_grad_batches 4"),
        ("args:torchtune", "batch_size=64 gradient_accumulation_steps=4"),
    ],
)
def test_arguments_in_the_words_of_a_framework(form: str, text: str) -> None:
    """Each refuses, under its own name, what one size cannot say."""
    assert plan_as_arguments(ONE_SIZE, form) == text
    with pytest.raises(PlanError, match=f"of which --format {form} can name one only"):
        plan_as_arguments(MIXED, form)


def test_deepspeed_is_told_the_whole_batch() -> None:
    """It asserts that its three numbers and the ranks agree."""
    plan = ProbeOptions(target=256, world_size=2).make_plan(32)
    told = json.loads(plan_as_arguments(plan, "args:deepspeed"))
    micro, steps = told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]
    assert told["train_batch_size"] == micro * steps * plan.world_size == 256


def test_transformers_reads_its_own_words() -> None:
    """By the parser of its own arguments."""
    transformers = pytest.importorskip("transformers")
    parser = transformers.HfArgumentParser(transformers.TrainingArguments)
    words = plan_as_arguments(ONE_SIZE, "args:hf").split()
    (read,) = parser.parse_args_into_dataclasses([*words, "--output_dir", "/tmp/none", "--use_cpu"])  # noqa: S108
    assert (read.per_device_train_batch_size, read.gradient_accumulation_steps) == (64, 4)


@pytest.mark.parametrize(
    ("plan", "ways"), [(MIXED, "--split even for one size, or --format env"), (RANKS, "take --format")]
)
def test_arguments_refuse_what_one_size_cannot_say(plan: Plan, ways: str) -> None:
    """Both sizes are named, and the way out; --split even only where it has a plan."""
    with pytest.raises(PlanError, match="86 and 85") as caught:
        plan_as_arguments(plan)
    assert ways in str(caught.value)
    assert "env or json" in str(caught.value)


@st.composite
def questions(draw: st.DrawFn) -> tuple[ProbeOptions, Plan]:
    options = {
        "target": draw(st.integers(1, 400)),
        "world_size": draw(st.integers(1, 6)),
        "multiple_of": draw(st.integers(1, 4)),
        "split": draw(st.sampled_from(["even", "balanced"])),
        "tolerance": draw(st.sampled_from(["0", "5%"])),
    }
    assume(options["multiple_of"] <= options["target"] // options["world_size"])
    asked = ProbeOptions(**options)
    try:
        return asked, asked.make_plan(draw(st.integers(asked.multiple_of, 100)))
    except PlanError:
        reject()


@given(question=questions())
def test_every_form_sums_to_the_effective_batch(question: tuple[ProbeOptions, Plan]) -> None:
    """Whoever multiplies or adds what a form says gets the plan's own batch, or the form refuses."""
    asked, plan = question
    values = variables(plan_as_environment(plan))
    told = sizes_told(values, plan.world_size)
    assert len(told) == plan.world_size
    assert {len(row) for row in told} == {plan.accumulation_steps}
    assert sum(map(sum, told)) == plan.effective_batch_size == int(values["AUTOBATCH_EFFECTIVE_BATCH_SIZE"] or 0)
    one = values["AUTOBATCH_MICRO_BATCH_SIZE"]
    assert one is None or int(one) * plan.accumulation_steps * plan.world_size == plan.effective_batch_size
    try:
        _, size, _, steps = plan_as_arguments(plan).split()
    except PlanError as error:
        assert one is None
        if "--split even" in str(error):
            even: dict[str, Any] = {
                "target": asked.target,
                "world_size": asked.world_size,
                "multiple_of": asked.multiple_of,
            }
            ProbeOptions(**even).make_plan(plan.micro_batch_size)
    else:
        assert int(size) * int(steps) * plan.world_size == plan.effective_batch_size


@given(question=questions())
def test_what_is_refused_before_a_probe_has_no_plan_of_one_size(question: tuple[ProbeOptions, Plan]) -> None:
    """The early refusal takes nothing away, and catches every plan whose ranks differ."""
    asked, plan = question
    check_form(asked, "env")
    if plan.rank_micro_batch_sizes is None:
        check_form(asked, "args")
        return
    with pytest.raises(PlanError, match=rf"target {asked.target} .* world_size {asked.world_size}.* env or json"):
        check_form(asked, "args")
