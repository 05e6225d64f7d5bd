"""The report: one JSON form that comes back as it was, and no report that contradicts itself."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.errors import UsageError
from autobatch.options import ProbeOptions
from autobatch.report import SCHEMA_VERSION, Device, Memory, Report, Versions, fingerprint, utc_timestamp
from autobatch.trial import Outcome, Trial

DOCUMENTED = {
    "": (
        "schema_version basis workload fingerprint plan objective measured_at micro_batches_per_step "
        "max_micro_batch_size smallest_failing ceiling_reached monotone device memory trials versions"
    ),
    "plan": (
        "target world_size split micro_batch_size accumulation_steps micro_batch_sizes effective_batch_size exact"
    ),
    "device": "name uuid total_bytes compute_capability driver",
    "memory": "budget_bytes headroom_bytes other_tenants_bytes context_bytes",
    "versions": "autobatch torch cuda",
}
DOCUMENTED_TRIAL = (
    "micro_batch_size outcome steps peak_allocated_bytes peak_reserved_bytes footprint_bytes alloc_retries "
    "seconds_per_step micro_batches_per_step confirmation"
)


def trial(size: int, outcome: Outcome, **changes: Any) -> Trial:
    """A trial of two micro-batches per step, without time, as an emulated card gives it."""
    values: dict[str, Any] = {
        "micro_batch_size": size,
        "outcome": outcome,
        "micro_batches_per_step": 2,
        "steps": 3,
        "peak_allocated_bytes": size * 2**20,
        "peak_reserved_bytes": size * 2**21,
        "footprint_bytes": size * 2**22,
        "alloc_retries": 0,
        "seconds_per_step": None,
    }
    return Trial(**(values | changes))


def report(**changes: Any) -> Report:
    """The report of an emulated probe that found 37 and failed at 38."""
    options = ProbeOptions(target=256, emulate="A100-SXM4-40GB")
    values: dict[str, Any] = {
        "basis": "emulated",
        "workload": "gpt2",
        "fingerprint": "0" * 16,
        "plan": options.make_plan(37),
        "objective": "max",
        "measured_at": "2026-11-20T11:00:00Z",
        "micro_batches_per_step": 2,
        "max_micro_batch_size": 37,
        "smallest_failing": 38,
        "ceiling_reached": False,
        "monotone": True,
        "device": Device(name="A100", uuid="GPU-1", total_bytes=2**35, compute_capability="8.0", driver="580.1"),
        "memory": Memory(budget_bytes=2**34, headroom_bytes=0, other_tenants_bytes=0, context_bytes=None),
        "trials": (
            trial(37, Outcome.FITS),
            trial(38, Outcome.OUT_OF_MEMORY, steps=0),
            trial(32, Outcome.FITS, confirmation=True),
        ),
        "versions": Versions(autobatch="0.1.0", torch="2.15.0", cuda=None),
        "options": options,
        "certified": True,
        "not_modelled": ("NCCL buffers",),
        "expected_error": "0.4 %",
    }
    return Report(**(values | changes))


def measured(**changes: Any) -> Report:
    """The same of a real card."""
    return report(**({"basis": "measured", "not_modelled": (), "expected_error": ""} | changes))


NOTHING_FITS: dict[str, Any] = {
    "plan": None,
    "max_micro_batch_size": None,
    "smallest_failing": 1,
    "trials": (trial(1, Outcome.OUT_OF_MEMORY, steps=0),),
}


def test_the_documented_form() -> None:
    """Every documented key is there, nested as documented, and in that order."""
    data = report().to_dict()
    for place, names in DOCUMENTED.items():
        inner = data[place] if place else data
        assert isinstance(inner, dict)
        assert [name for name in inner if name in names.split()] == names.split()
    trials = data["trials"]
    assert isinstance(trials, list)
    assert all(isinstance(item, dict) and set(DOCUMENTED_TRIAL.split()) <= set(item) for item in trials)
    assert data["schema_version"] == SCHEMA_VERSION == 1
    options = data["options"]
    assert isinstance(options, dict)
    assert options["target"] == 256


def test_missing_figures_are_null() -> None:
    """Never -1, never a text."""
    data = json.loads(report(**NOTHING_FITS).to_json())
    assert [data["plan"], data["max_micro_batch_size"], data["memory"]["context_bytes"]] == [None] * 3
    assert data["trials"][0]["seconds_per_step"] is None
    assert data["versions"]["cuda"] is None


sizes_in_bytes = st.integers(min_value=0, max_value=2**45)
texts = st.text(max_size=20)
trials = st.builds(
    lambda size, outcome, peak, seconds, confirmation, note: trial(
        size,
        outcome,
        peak_reserved_bytes=peak,
        seconds_per_step=seconds,
        confirmation=confirmation,
        note=note,
        window=(size, 1),
    ),
    st.integers(min_value=1, max_value=37),
    st.sampled_from(Outcome),
    sizes_in_bytes,
    st.none() | st.floats(min_value=0, allow_infinity=False),
    st.booleans(),
    texts,
)


@given(
    tried=st.lists(trials, max_size=5),
    workload=texts,
    driver=st.none() | texts,
    memory=st.tuples(sizes_in_bytes, sizes_in_bytes, st.none() | sizes_in_bytes, st.none() | sizes_in_bytes),
    target=st.integers(min_value=1, max_value=300),
    split=st.sampled_from(["even", "balanced"]),
    flags=st.tuples(st.booleans(), st.booleans()),
    warnings=st.lists(texts, max_size=2),
)
def test_round_trip(
    tried: list[Trial],
    workload: str,
    driver: str | None,
    memory: tuple[int, int, int | None, int | None],
    target: int,
    split: Any,
    flags: tuple[bool, bool],
    warnings: list[str],
) -> None:
    """Through text and back, any report is the same."""
    options = ProbeOptions(target=target, split=split)
    original = measured(
        workload=workload,
        options=options,
        plan=options.make_plan(37),
        trials=tuple(tried),
        device=Device(name="x", uuid=None, total_bytes=1, compute_capability=None, driver=driver),
        memory=Memory(
            budget_bytes=memory[0],
            headroom_bytes=memory[1],
            other_tenants_bytes=memory[2],
            context_bytes=memory[3],
        ),
        monotone=flags[0],
        certified=flags[1],
        warnings=tuple(warnings),
    )
    assert Report.from_json(original.to_json()) == original
    assert Report.from_dict(original.to_dict()) == original
    assert "\n" not in original.to_json()


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_another_schema_version_is_named(version: object) -> None:
    """What this version cannot read is refused, with both versions."""
    data: dict[str, Any] = report().to_dict() | {"schema_version": version}
    with pytest.raises(UsageError, match=r"report has .*schema_version.*, this autobatch reads 1; probe again"):
        Report.from_dict(data)
    del data["schema_version"]
    with pytest.raises(UsageError, match="report has no schema_version"):
        Report.from_dict(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "report is not JSON"),
        ("{", "report is not JSON"),
        ("[" * 100_000, "report is not JSON"),
        (b"\xff\xfe\xfd", "report is not JSON"),
        ("[]", "report is \\[\\]; an object is wanted"),
        ("null", "report is null; an object is wanted"),
        ('{"schema_version": 1}', "report.basis is missing"),
    ],
)
def test_malformed_text(text: str | bytes, words: str) -> None:
    """Anything that is no report is one usage error."""
    with pytest.raises(UsageError, match=words):
        Report.from_json(text)


def test_a_nested_fault_is_placed() -> None:
    """The message names the trial and the field."""
    data: Any = json.loads(report().to_json())
    data["trials"][1]["steps"] = "three"
    with pytest.raises(UsageError, match=re.escape("report.trials[1].steps is 'three'; a whole number is wanted")):
        Report.from_dict(data)
    data["trials"][1]["steps"] = 0
    data["plan"]["effective_batch_size"] = 255
    with pytest.raises(UsageError, match=r"report\.plan contradicts itself: effective_batch_size 255 is not the sum"):
        Report.from_dict(data)
    data["plan"]["effective_batch_size"] = 256
    data["options"]["target"] = 0
    with pytest.raises(UsageError, match=r"report\.options: target 0 is below 1"):
        Report.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "schema_version 2"),
        ({"micro_batches_per_step": 3}, "neither 1 nor 2"),
        ({"measured_at": "yesterday"}, "measured_at 'yesterday'"),
        ({"measured_at": "2026-11-20T11:00:00+01:00"}, "not a time in UTC"),
        ({"max_micro_batch_size": 0, "plan": None}, "max_micro_batch_size 0 is below 1; .* None"),
        ({"max_micro_batch_size": 31}, "the plan takes 32, above max_micro_batch_size 31"),
        ({"max_micro_batch_size": None}, "but a plan"),
        ({"max_micro_batch_size": None, "plan": None}, "a trial says that one fits"),
        (NOTHING_FITS | {"ceiling_reached": True}, "the ceiling"),
        ({"ceiling_reached": True}, "smallest_failing is 38"),
        ({"data_dependent": ("nonzero",)}, "never certified"),
        ({"basis": "measured"}, "belong to emulated answers only"),
        ({"trials": (trial(37, Outcome.FITS, seconds_per_step=0.5),)}, "knows no time"),
        ({"trials": (trial(37, Outcome.FITS, seconds_per_step_end=0.5),)}, "knows no time"),
        ({"trials": (trial(37, Outcome.FITS, timed_steps=2),)}, "knows no time"),
    ],
)
def test_a_report_that_contradicts_itself_cannot_be_made(changes: dict[str, Any], words: str) -> None:
    """The invariants hold however the value is made."""
    with pytest.raises(ValueError, match=words):
        report(**changes)


def test_negative_figures_are_refused() -> None:
    """A missing figure is None; a negative one is a fault."""
    with pytest.raises(ValueError, match="context_bytes -1 is below 0; a missing figure is None"):
        dataclasses.replace(report().memory, context_bytes=-1)
    with pytest.raises(ValueError, match="total_bytes 0 is below 1"):
        dataclasses.replace(report().device, total_bytes=0)


def test_counts_leave_confirmations_out() -> None:
    """Sizes tried are the search's own; an OOM counts wherever it came."""
    assert (report().num_sizes_tried, report().num_ooms) == (2, 1)


def test_fingerprint_is_stable() -> None:
    """The same in every process and order of facts: this value may not change within a schema version."""
    facts = {"workload": "gpt2", "total_bytes": 42949672960, "parameters": {"b": 2, "a": (1, None)}, "é": "ü"}
    assert fingerprint(**facts) == fingerprint(**dict(reversed(facts.items()))) == "c3f2ee703f2f76f4"


def test_fingerprint_tells_facts_apart() -> None:
    """Any other value, type or name of a fact gives another fingerprint."""
    variants: list[dict[str, object]] = [
        {"a": 1},
        {"a": "1"},
        {"a": 1.0},
        {"a": True},
        {"a": None},
        {"b": 1},
        {"a": 1, "b": None},
        {"a": (1,)},
        {},
    ]
    prints = [fingerprint(**facts) for facts in variants]
    assert len(set(prints)) == len(variants)
    assert all(re.fullmatch("[0-9a-f]{16}", text) for text in prints)


def test_fingerprint_takes_values_and_refuses_the_rest() -> None:
    """A frozen value is a fact; an object whose text holds an address is not."""
    assert fingerprint(options=ProbeOptions(target=1)) != fingerprint(options=ProbeOptions(target=2))
    with pytest.raises(TypeError, match="object has no JSON form"):
        fingerprint(workload=object())


def test_timestamp_is_one_that_a_report_takes() -> None:
    """`utc_timestamp` gives the form of `measured_at`."""
    stamp = utc_timestamp()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stamp)
    assert report(measured_at=stamp).measured_at == stamp


def test_the_pure_floor_imports_nothing_heavy() -> None:
    """Importing the report, and with it plan and options, loads no torch, no NVML and no third party."""
    code = "import sys, autobatch.report; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "autobatch" in loaded
    foreign = set(loaded) - set(sys.stdlib_module_names) - {"autobatch", "__main__"}
    assert not foreign & {"torch", "pynvml", "rich", "numpy", "pydantic", "typer"}
    assert not {"json", "hashlib", "datetime"} & set(loaded)
