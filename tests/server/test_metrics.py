"""Prometheus can read it: names and units as its conventions have them, counts once, labels that cannot grow."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families
from service_fakes import FakeExecutor, make_report, make_settings, running_service, succeeding

from autobatch import __version__
from autobatch.store import NewMeasurement

if TYPE_CHECKING:
    from pathlib import Path

    from prometheus_client import Metric
    from service_fakes import RunningService

QUERY = "/v1/plan?workload=gpt2&gpu=A100-40GB&target=256"


def families(service: RunningService) -> dict[str, Metric]:
    response = service.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = list(text_string_to_metric_families(response.text))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def value(service: RunningService, name: str, **labels: str) -> float:
    samples = [sample for family in families(service).values() for sample in family.samples]
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def test_names_and_units_follow_the_conventions(service: RunningService) -> None:
    """Our prefix, base units, `_total` on counters alone, a help text on each; seconds where time is counted."""
    service.client.get(QUERY)
    found = families(service)
    assert {"autobatch_http_request_duration_seconds", "autobatch_plan_answers", "autobatch_oom_after_plan"} <= set(
        found
    )
    for family in found.values():
        assert re.fullmatch(r"autobatch_[a-z][a-z_]*", family.name)
        assert family.documentation.endswith(".")
        assert family.type in {"counter", "gauge", "histogram"}
        if family.type == "counter":
            assert all(sample.name.endswith(("_total", "_created")) for sample in family.samples)
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        assert not re.search(r"milli|minutes|_mb|_mib|_gb|percent", family.name)
    assert found["autobatch_build_info"].samples[0].labels == {"version": __version__}


def test_each_request_is_counted_once_under_its_route(service: RunningService) -> None:
    """By method, the route's pattern and the status: ids never become labels."""
    name = "autobatch_http_request_duration_seconds_count"
    for _ in range(3):
        service.client.get(QUERY)
    assert value(service, name, method="GET", route="/v1/plan", status="200") == 3
    for number in range(5):
        service.client.get(f"/v1/measurements/mea_{number:027x}")
    assert value(service, name, route="/v1/measurements/{measurement_id}", status="404") == 5


def test_no_request_can_make_a_label_of_its_own(service: RunningService) -> None:
    """Unknown paths are one route, unknown methods one method, however many come."""

    def num_series() -> int:
        return len(families(service)["autobatch_http_request_duration_seconds"].samples)

    service.client.get("/nope/first")
    service.client.request("BREW", "/v1/plan")
    service.client.request("BREW", "/nope")
    num_series()  # the request for the metrics themselves makes one
    before = num_series()
    for number in range(20):
        service.client.get(f"/nope/{number}")
        service.client.get(f"/v1/plan/{number}")
        service.client.request(f"BREW{number}", "/nope")
        service.client.request(f"BREW{number}", "/v1/plan")
    assert num_series() == before
    assert not re.search(r"BREW|nope", service.client.get("/metrics").text)


def test_verdicts_are_counted_also_where_an_answer_comes_from_memory(service: RunningService) -> None:
    """Each answer once, by what it said."""
    for _ in range(2):
        service.client.get(QUERY)
    new = NewMeasurement.of(make_report(), workload="gpt2", gpu="A100-SXM4-40GB", source="reported")
    service.services.measurements.add(new, token_id=None)
    for _ in range(3):
        service.client.get(QUERY)
    name = "autobatch_plan_answers_total"
    assert (value(service, name, verdict="unknown"), value(service, name, verdict="fits")) == (2, 3)


def test_probes_and_measurements_are_those_of_the_database(service: RunningService) -> None:
    """Every state and basis is there from the beginning, as 0; a probe that ends is counted where it ended."""
    assert value(service, "autobatch_probes", state="succeeded") == 0
    labels = {sample.labels["state"] for sample in families(service)["autobatch_probes"].samples}
    assert labels == {"queued", "running", "succeeded", "failed", "cancelled"}
    assert {sample.labels["basis"] for sample in families(service)["autobatch_measurements"].samples} == {
        "measured", "emulated",
    }  # fmt: skip
    probe = service.client.post("/v1/probes", json={"workload": "gpt2", "target": 256, "gpu": "A100-40GB"}).json()
    service.wait_for(probe["id"], "succeeded")
    assert value(service, "autobatch_probes", state="succeeded") == 1
    assert value(service, "autobatch_measurements", basis="emulated") == 1


def test_without_the_database_there_are_no_figures_and_afterwards_there_are(tmp_path: Path) -> None:
    """503 rather than half of them or zeros; and nothing is to be restarted."""
    with running_service(make_settings(tmp_path, run_probes=False), executor=FakeExecutor(succeeding)) as service:
        assert service.client.get("/metrics").status_code == 200
        path = tmp_path / "server.sqlite3"
        path.rename(tmp_path / "away")
        response = service.client.get("/metrics")
        assert (response.status_code, response.json()["code"]) == (503, "store-unavailable")
        assert "retry-after" in response.headers
        (tmp_path / "away").rename(path)
        assert service.client.get("/metrics").status_code == 200


@pytest.mark.parametrize("number", [1, 2])
def test_open_streams_are_a_gauge_that_comes_back_to_nothing(service: RunningService, number: int) -> None:
    """Streams that ended are no longer counted."""
    for _ in range(number):
        probe = service.client.post(
            "/v1/probes", json={"workload": "gpt2", "target": 256, "gpu": "L4", "force": True}
        ).json()  # fmt: skip
        with service.client.stream("GET", f"/v1/probes/{probe['id']}/events") as response:
            response.read()
    assert value(service, "autobatch_event_streams") == 0
