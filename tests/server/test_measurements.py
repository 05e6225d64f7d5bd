"""What others report is kept, listed, asked for and forgotten."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from service_fakes import make_report

from autobatch import Report
from autobatch.store import iso_time

if TYPE_CHECKING:
    import httpx
    from service_fakes import RunningService

QUERY = "/v1/plan?workload=gpt2&gpu=A100-40GB&target=256"
PROMISE_BROKEN = "autobatch_oom_after_plan_total"


def post(service: RunningService, report: Report, **beside: Any) -> httpx.Response:
    return service.client.post("/v1/measurements", json={"report": report.to_dict(), **beside})


def post_oom(service: RunningService, **values: Any) -> httpx.Response:
    oom = {"workload": "gpt2", "gpu": "A100-40GB", "micro_batch_size": 32, "accumulation_steps": 8, **values}
    return service.client.post("/v1/measurements", json={"oom": oom})


def metric(service: RunningService, name: str) -> float:
    text = service.client.get("/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


def test_a_report_comes_back_as_it_was_sent_and_answers(service: RunningService) -> None:
    """201, then one measurement with its report, one line of the list without it, and the plan."""
    report = make_report()
    created = post(service, report)
    assert created.status_code == 201
    measurement = service.client.get(f"/v1/measurements/{created.json()['id']}").json()
    assert measurement == created.json()
    assert Report.from_dict(measurement["report"]) == report
    assert (measurement["source"], measurement["probe"], measurement["gpu"]) == ("reported", None, "A100-SXM4-40GB")
    (listed,) = service.client.get("/v1/measurements").json()["measurements"]
    assert listed == {**measurement, "report": None}
    assert service.client.get(QUERY).json()["plan"]["micro_batch_sizes"] == [32] * 8


def test_a_job_that_goes_by_another_name_here_is_named_beside_the_report(service: RunningService) -> None:
    """A report of a file's factory is kept under the service's name; without one it is refused."""
    report = dataclasses.replace(make_report(), workload="train.py:make")
    assert post(service, report).json()["code"] == "unknown-workload"
    kept = post(service, report, workload="gpt2?seq_len=512")
    assert kept.json()["workload"] == "gpt2?seq_len=512"
    assert service.client.get(QUERY).json()["verdict"] == "unknown"
    assert service.client.get(QUERY.replace("gpt2", "gpt2%3Fseq_len%3D512")).json()["verdict"] == "fits"


def test_a_card_outside_the_catalogue_is_kept_by_its_drivers_name(service: RunningService) -> None:
    """And found by it in the list."""
    device = dataclasses.replace(make_report().device, name="NVIDIA GeForce GTX 1080 Ti")
    kept = post(service, dataclasses.replace(make_report(), device=device))
    assert kept.json()["gpu"] == "NVIDIA GeForce GTX 1080 Ti"
    found = service.client.get("/v1/measurements", params={"gpu": "NVIDIA GeForce GTX 1080 Ti"}).json()["measurements"]
    assert [one["id"] for one in found] == [kept.json()["id"]]


def test_pages_go_from_the_newest_to_the_oldest_and_hold_each_once(service: RunningService) -> None:
    """By job (with all parameters of it), by card, in pages of any size."""
    jobs = ["gpt2", "gpt2?seq_len=512", "vit"] * 3
    ids = [post(service, make_report(), workload=job).json()["id"] for job in jobs]
    found: list[str] = []
    parameters: dict[str, Any] = {"limit": 4}
    while True:
        page = service.client.get("/v1/measurements", params=parameters).json()
        found += [one["id"] for one in page["measurements"]]
        if page["next"] is None:
            break
        parameters["before"] = page["next"]
    assert sorted(found) == sorted(ids)
    assert len(found) == len(ids)

    def count(**query: str) -> int:
        return len(service.client.get("/v1/measurements", params=query).json()["measurements"])

    assert (count(workload="gpt2"), count(workload="gpt2?seq_len=512"), count(workload="gpt_")) == (6, 3, 0)
    assert (count(gpu="nvidia_a100-sxm4-40gb"), count(gpu="L4")) == (9, 0)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"schema_version": 99}, "invalid-report"),
        ({"trials": []}, "invalid-report"),
        ({"trials": 3}, "invalid-report"),
        ({"max_micro_batch_size": None}, "invalid-report"),
        ({"basis": "guessed"}, "invalid-report"),
        ({"workload": "nope"}, "unknown-workload"),
    ],
)
def test_what_is_no_report_is_refused_and_kept_nowhere(service: RunningService, change: Any, code: str) -> None:
    """With a code, and nothing of the inside."""
    response = service.client.post("/v1/measurements", json={"report": make_report().to_dict() | change})
    assert (response.status_code in {404, 422}, response.json()["code"]) == (True, code)
    assert "Traceback" not in response.text
    assert service.client.get("/v1/measurements").json()["measurements"] == []


def test_a_report_and_an_error_are_sent_one_at_a_time(service: RunningService) -> None:
    """Both or neither is refused."""
    oom = {"workload": "gpt2", "gpu": "L4", "micro_batch_size": 1}
    for body in ({}, {"report": make_report().to_dict(), "oom": oom}):
        assert service.client.post("/v1/measurements", json=body).json()["code"] == "invalid-request"


def test_an_out_of_memory_error_lowers_the_bound_and_breaks_a_promise_where_one_was_made(
    service: RunningService,
) -> None:
    """The plan falls below it; only one that names the plan's measurement counts as a broken promise."""
    measurement = post(service, make_report()).json()["id"]
    assert (metric(service, PROMISE_BROKEN), metric(service, "autobatch_oom_reports_total")) == (0, 0)
    assert post_oom(service).json()["after_plan"] is False
    assert metric(service, PROMISE_BROKEN) == 0
    broken = post_oom(service, measurement=measurement)
    assert (broken.status_code, broken.json()["after_plan"]) == (201, True)
    assert (metric(service, PROMISE_BROKEN), metric(service, "autobatch_oom_reports_total")) == (1, 2)
    answer = service.client.get(QUERY).json()
    assert (answer["plan"]["micro_batch_size"], answer["bounds"]["smallest_failing"]) == (16, 32)
    assert "2 out-of-memory errors" in answer["reason"]


def test_an_error_without_accumulation_says_more_than_one_with_it(service: RunningService) -> None:
    """One micro-batch per step that failed fails under accumulation too; the reverse says nothing of it."""
    post(service, make_report(target=8, largest=8))
    post_oom(service, micro_batch_size=8, accumulation_steps=2)
    query = QUERY.replace("256", "8")
    assert service.client.get(query).json()["verdict"] == "fits"
    post_oom(service, micro_batch_size=8, accumulation_steps=1)
    assert service.client.get(query).json()["verdict"] == "unknown"


def test_what_was_wrong_is_forgotten_and_no_counter_falls(service: RunningService) -> None:
    """A measurement and an error are deleted by id; Prometheus would read a smaller count as a new beginning."""
    measurement = post(service, make_report()).json()["id"]
    errors = [post_oom(service, measurement=measurement).json()["id"] for _ in range(3)]
    assert metric(service, PROMISE_BROKEN) == 3
    for gone in (measurement, *errors[:2]):
        assert service.client.delete(f"/v1/measurements/{gone}").status_code == 204
        assert service.client.delete(f"/v1/measurements/{gone}").status_code == 404
    assert service.client.get(f"/v1/measurements/{measurement}").status_code == 404
    assert metric(service, PROMISE_BROKEN) == 3
    post_oom(service, micro_batch_size=9)
    assert (metric(service, PROMISE_BROKEN), metric(service, "autobatch_oom_reports_total")) == (3, 4)


def test_times_are_written_in_utc() -> None:
    """To the millisecond; no time is no text."""
    assert iso_time(0.5) == "1970-01-01T00:00:00.500Z"
    assert iso_time(None) is None
