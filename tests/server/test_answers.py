"""What is stored answers: the newest of real cards first, then emulated ones, and a reported error lowers it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from service_fakes import GIB, make_report, make_trial

from autobatch import PlanError, ProbeOptions, Report, SizeFailure
from autobatch.store import MeasurementStore, NewMeasurement
from autobatch_server.answers import Answer, answer_question
from autobatch_server.database import open_database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GPU = "A100-SXM4-40GB"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MeasurementStore]:
    with open_database(f"sqlite:///{tmp_path / 's.sqlite3'}") as database:
        yield MeasurementStore(database)


def keep(store: MeasurementStore, report: Report, *, gpu: str = GPU) -> str:
    new = NewMeasurement.of(report, workload="gpt2", gpu=gpu, source="reported")
    return store.add(new, token_id=None).id


def report_oom(store: MeasurementStore, size: int, *, steps: int = 2) -> str:
    failure = SizeFailure(micro_batch_size=size, micro_batches_per_step=steps)
    return store.add_oom(
        failure, workload="gpt2", gpu=GPU, measurement_id=None, after_plan=False, token_id=None
    ).id  # fmt: skip


def ask(store: MeasurementStore, target: int = 256, *, basis: str | None = None, **options: Any) -> Answer:
    return answer_question(
        store, workload="gpt2", gpu=GPU, options=ProbeOptions(target=target, **options), basis=basis
    )  # fmt: skip


def with_budget(report: Report, budget_bytes: int, **memory: int) -> Report:
    return dataclasses.replace(report, memory=dataclasses.replace(report.memory, budget_bytes=budget_bytes, **memory))


def measured(largest: int, **values: Any) -> Report:
    return make_report(largest=largest, basis="measured", **values)


def test_without_measurements_nothing_is_known(store: MeasurementStore) -> None:
    """Nor from those of another card or job."""
    keep(store, make_report(gpu="L4"), gpu="L4")
    answer = ask(store)
    assert (answer.verdict, answer.plan, answer.measurement, answer.bound) == ("unknown", None, None, None)


def test_another_target_or_world_size_is_arithmetic(store: MeasurementStore) -> None:
    """One probe at 256 answers for others, each with the plan that the library makes."""
    measurement = keep(store, make_report(target=256, largest=37))
    for options in ({"target": 1024}, {"target": 600, "world_size": 4}, {"target": 444, "split": "balanced"}):
        answer = ask(store, **options)  # type: ignore[arg-type]
        assert answer.plan == ProbeOptions(**options).make_plan(37)  # type: ignore[arg-type]
        assert answer.measurement is not None
        assert answer.measurement.id == measurement


def test_a_target_that_cannot_be_hit_is_an_error_whether_anything_is_stored(store: MeasurementStore) -> None:
    """251 over two ranks, evenly."""
    for _ in range(2):
        with pytest.raises(PlanError):
            ask(store, 251, world_size=2)
        keep(store, make_report())


def test_real_cards_are_asked_before_emulated_ones_and_the_newest_series_first(store: MeasurementStore) -> None:
    """Whatever the order in which they came; a basis that is asked for is the only one."""
    keep(store, measured(20, torch="2.9"))
    newer = keep(store, measured(30, torch="2.10"))
    emulated = keep(store, make_report(largest=37))
    answer = ask(store)
    assert answer.measurement is not None
    assert (answer.measurement.id, answer.bound.largest_fitting) == (newer, 30)  # type: ignore[union-attr]
    only = ask(store, basis="emulated")
    assert only.measurement is not None
    assert (only.measurement.id, only.plan) == (emulated, ProbeOptions(target=256).make_plan(37))


def test_what_the_first_series_leaves_open_the_next_answers(store: MeasurementStore) -> None:
    """A real card was probed for a share of 8 alone; the emulated answer for 256 says what it is."""
    keep(store, make_report(largest=37))
    keep(store, measured(8, target=8))
    assert ask(store, 8).measurement.report.basis == "measured"  # type: ignore[union-attr]
    answer = ask(store)
    assert answer.verdict == "fits"
    assert answer.measurement.report.basis == "emulated"  # type: ignore[union-attr]
    assert ask(store, basis="measured").verdict == "unknown"


def test_trials_of_one_series_answer_together(store: MeasurementStore) -> None:
    """Two probes of the same job and versions: each alone leaves open what both close."""
    keep(store, make_report(target=64, largest=37, extra_trials=[make_trial(20, fits=True)]))
    keep(store, make_report(target=8, largest=8))
    answer = ask(store, 1024)
    assert answer.plan == ProbeOptions(target=1024).make_plan(37)
    assert answer.footprint_bytes == make_trial(37, fits=True).footprint_bytes


def test_data_dependent_shapes_never_answer(store: MeasurementStore) -> None:
    """They under-measure; the reason says that something is there."""
    keep(store, dataclasses.replace(make_report(), certified=False, data_dependent=("aten::nonzero",)))
    answer = ask(store)
    assert (answer.verdict, answer.plan) == ("unknown", None)
    assert "under-measure" in answer.reason


def test_a_trial_counts_only_under_a_budget_for_which_it_says_something(store: MeasurementStore) -> None:
    """Beside a tenant 30 failed: that says nothing of the empty card; what fitted beside it fits there too."""
    crowded = with_budget(measured(29), 33 * GIB, other_tenants_bytes=7 * GIB)
    keep(store, crowded)
    keep(store, with_budget(measured(37), 40 * GIB))
    assert ask(store).bound.smallest_failing == 38  # type: ignore[union-attr]
    keep(store, crowded)
    later = ask(store)
    assert (later.bound.largest_fitting, later.bound.smallest_failing) == (29, 30)  # type: ignore[union-attr]
    assert f"others held {7 * GIB} bytes" in later.reason


def test_a_reported_error_lowers_the_bound_until_it_is_forgotten(store: MeasurementStore) -> None:
    """The plan falls below it, the reason says why; forgotten, the old plan is back."""
    keep(store, make_report(largest=37))
    oom = report_oom(store, 32)
    answer = ask(store)
    assert answer.plan == ProbeOptions(target=256).make_plan(31)
    assert answer.num_oom_reports == 1
    assert "1 out-of-memory error reported in training, the least at 32" in answer.reason
    assert store.delete(oom)
    assert ask(store).plan == ProbeOptions(target=256).make_plan(37)


def test_an_error_at_the_smallest_size_is_does_not_fit_even_without_a_measurement(store: MeasurementStore) -> None:
    """One above it is not: nothing is known of smaller sizes."""
    report_oom(store, 4, steps=1)
    assert ask(store).verdict == "unknown"
    report_oom(store, 1, steps=1)
    answer = ask(store)
    assert (answer.verdict, answer.measurement, answer.missing_bytes) == ("does_not_fit", None, None)


def test_what_does_not_fit_says_by_how_many_bytes(store: MeasurementStore) -> None:
    """2 GiB held, 100 GiB for a sample, half a GiB outside and 1 GiB asked for, of 40 GiB."""
    keep(store, make_report(largest=None))
    answer = ask(store)
    assert (answer.verdict, answer.plan) == ("does_not_fit", None)
    assert answer.missing_bytes == 102 * GIB + GIB // 2 + GIB - 40 * GIB


def test_seconds_are_those_of_the_plans_own_size_on_a_real_card(store: MeasurementStore) -> None:
    """Eight micro-batches of 1 s and one end of half a second, from trials of two and one."""
    timed = dataclasses.replace(
        make_trial(32, fits=True), seconds_per_step=2.5, seconds_per_step_end=0.5, timed_steps=2
    )  # fmt: skip
    keep(store, measured(37, extra_trials=[timed]))
    assert ask(store).seconds_per_batch == pytest.approx(8.5)
    assert ask(store, 1022).seconds_per_batch is None


def test_the_footprint_is_that_of_a_trial_which_accumulated(store: MeasurementStore) -> None:
    """The same size without gradients takes less, and would promise too much room."""
    small = dataclasses.replace(make_trial(32, fits=True, steps=1), footprint_bytes=GIB)
    keep(store, make_report(largest=37, extra_trials=[small]))
    assert ask(store).footprint_bytes == make_trial(37, fits=True).footprint_bytes
