"""`autobatch probe --report-to`: what was found reaches the service, or is kept with a word on how to send it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from http_answers import answering
from service_fakes import FakeExecutor, make_report, make_settings, running_service, succeeding

from autobatch.errors import UnavailableError, UsageError
from autobatch.reporting import ReportingService

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service_fakes import RunningService


TOKEN = "abt_0123456789abcdef_nobody-made-this-one"  # noqa: S105 - made up


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """A service without tokens."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as running:
        yield running


def test_a_report_arrives_and_answers_queries(service: RunningService) -> None:
    """What was sent is what the service answers from."""
    reporting = ReportingService(url=service.url)
    reporting.check("gpt2")
    measurement = reporting.send(make_report(basis="measured"), workload="gpt2")
    answer = service.client.get("/v1/plan?workload=gpt2&gpu=A100-40GB&target=256").json()
    assert (answer["verdict"], answer["basis"], answer["measurement"]) == ("fits", "measured", measurement)


def test_an_unknown_workload_is_told_before_the_probe_with_those_that_are_known(service: RunningService) -> None:
    """So that minutes of a probe are not spent for a report that is refused."""
    with pytest.raises(
        UsageError, match=r"knows no workload 'train.py:job': --report-as takes one of gpt2, resnet50, vit"
    ):
        ReportingService(url=service.url).check("train.py:job")


def test_a_missing_token_is_named_with_the_variable(service: RunningService) -> None:
    """From the first token on, reporting needs one with the scope probe:write."""
    narrow = service.services.tokens.create("reader", ["plan:read"], seconds=None)[1]
    with pytest.raises(UnavailableError, match=r"unauthenticated.*AUTOBATCH_TOKEN"):
        ReportingService(url=service.url).check("gpt2")
    reader = ReportingService(url=service.url, token=narrow)
    reader.check("gpt2")
    with pytest.raises(UnavailableError, match=r"this needs the scope probe:write"):
        reader.send(make_report(), workload="gpt2")


def test_what_passes_is_tried_again_and_what_does_not_is_not() -> None:
    """503 twice and then an answer is a success; 400 is final at once."""
    good = (201, {}, b'{"id": "mea_1"}')
    away = (503, {}, b'{"detail": "nothing was changed", "code": "store-unavailable"}')
    with answering(away, away, good) as (url, asked):
        assert ReportingService(url=url).send(make_report(), workload="gpt2") == "mea_1"
        assert len(asked) == 3
    with answering((400, {}, b"{}")) as (url, asked), pytest.raises(UnavailableError, match="status 400"):
        ReportingService(url=url).send(make_report(), workload="gpt2")
    assert len(asked) == 1


def test_a_redirect_never_takes_the_token_elsewhere() -> None:
    """The token is for the address that was named: the other one is not asked at all."""
    with (
        answering((200, {}, b"{}")) as (other, asked_there),
        answering((302, {"Location": other}, b"")) as (url, asked_here),
        pytest.raises(UnavailableError, match="status 302"),
    ):
        ReportingService(url=url, token=TOKEN).check("gpt2")
    assert asked_there == []
    assert asked_here == [f"GET /v1/workloads Bearer {TOKEN}"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("scheduler:8000", "write one like http://scheduler:8000"),
        ("file:///etc/passwd", "write one like"),
        ("http://user:secret@host", "AUTOBATCH_TOKEN"),
        ("http://host/?token=secret", "AUTOBATCH_TOKEN"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str, said: str) -> None:
    """In one line with the way out, which repeats no secret."""
    with pytest.raises(UsageError, match=said) as caught:
        ReportingService(url=url)
    assert "secret" not in str(caught.value)


def test_a_token_with_a_line_break_is_refused_without_being_shown() -> None:
    """A pasted token often ends with one; it would otherwise split the header."""
    with pytest.raises(UsageError, match="copy it again") as caught:
        ReportingService(url="http://host", token=f"{TOKEN}\r\nHost: evil")
    assert TOKEN not in str(caught.value)


def run_probe(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "autobatch",
            "probe",
            "gpt2?layers=2&width=128&heads=2&vocab=512",
            "--target",
            "8",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(environment or {})},
    )


@pytest.mark.slow
def test_the_command_line_reports_and_draws(service: RunningService, tmp_path: Path) -> None:
    """One probe, printed, drawn and reported; the service then answers the same plan."""
    plot = tmp_path / "curve.svg"
    done = run_probe("--emulate", "T4", "--format", "json", "--plot", str(plot), "--report-to", service.url)
    assert done.returncode == 0, done.stderr
    assert f"plot written to {plot}" in done.stderr
    assert f"reported to {service.url} as mea_" in done.stderr
    assert plot.read_text().startswith("<svg")
    query = {"workload": "gpt2?layers=2&width=128&heads=2&vocab=512", "gpu": "T4", "target": "8"}
    answer = service.client.get("/v1/plan", params=query).json()
    assert answer["verdict"] == "fits"
    assert answer["plan"] == json.loads(done.stdout)["plan"]


def test_a_plot_that_cannot_be_written_and_a_service_that_is_not_there_end_before_the_probe(tmp_path: Path) -> None:
    """Exit 2 and 69 at once, with nothing on standard output."""
    done = run_probe("--emulate", "T4", "--plot", str(tmp_path / "no" / "such.png"))
    assert (done.returncode, done.stdout) == (2, "")
    done = run_probe("--emulate", "T4", "--report-to", "http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (69, "")
    assert "http://127.0.0.1:9 cannot be used: Connection refused" in done.stderr


def test_a_report_that_cannot_be_sent_afterwards_is_kept(tmp_path: Path) -> None:
    """The plan was printed, the report stands in a file, and the message says how to send it: nothing is lost."""
    known = (
        200,
        {},
        b'{"workloads": [{"name": "gpt2", "parameters": {"layers": {}, "width": {}, "heads": {}, "vocab": {}}}]}',
    )
    refused = (422, {}, b'{"detail": "no", "code": "invalid-report"}')
    with answering(known, refused) as (url, _):
        done = run_probe(
            "--emulate", "T4", "--format", "json", "--report-to", url, environment={"TMPDIR": str(tmp_path)}
        )
    assert done.returncode == 69
    assert json.loads(done.stdout)["plan"]["target"] == 8
    kept = list(tmp_path.glob("autobatch-report-*.json"))
    assert len(kept) == 1
    assert str(kept[0]) in done.stderr
    assert json.loads(kept[0].read_text())["report"] == json.loads(done.stdout)


def test_without_a_gpu_reporting_needs_the_card_named(service: RunningService) -> None:
    """An emulated answer is never reported unasked: exit 69 names --emulate."""
    done = run_probe("--report-to", service.url)
    assert done.returncode == 69
    assert "--emulate" in done.stderr


def test_a_report_is_of_the_parameters_that_ran(service: RunningService) -> None:
    """By another name they go along: a small model's sizes never answer for the large one."""
    report = make_report(workload="jobs.py:job?layers=2")
    sent = {"report": report.to_dict(), "workload": "gpt2"}
    assert service.client.post("/v1/measurements", json=sent).json()["workload"] == "gpt2?layers=2"
    asked = {"gpu": "A100-40GB", "target": "256"}
    assert service.client.get("/v1/plan", params={"workload": "gpt2", **asked}).json()["verdict"] == "unknown"
    assert service.client.get("/v1/plan", params={"workload": "gpt2?layers=2", **asked}).json()["verdict"] == "fits"


def test_a_parameter_that_the_service_does_not_know_is_told_before_the_probe(service: RunningService) -> None:
    """The message names it, and those that there are."""
    with pytest.raises(UsageError, match=r"knows no parameter 'depth' of gpt2: it takes seq_len"):
        ReportingService(url=service.url).check("gpt2?depth=3")


def test_a_slip_in_a_query_is_refused_rather_than_passed_over(service: RunningService) -> None:
    """The answer would be to another question."""
    for slip in ("worldsize=4", "target=128"):
        response = service.client.get(f"/v1/plan?workload=gpt2&gpu=T4&target=256&{slip}")
        assert response.status_code == 422
        assert slip.partition("=")[0] in response.json()["detail"]
