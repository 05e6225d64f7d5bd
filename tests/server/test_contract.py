"""The running service against its own OpenAPI document, by schemathesis with every check, as four kinds of asker."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from schemathesis.engine import events, from_schema
from service_fakes import FakeExecutor, make_report, make_settings, make_trial, running_service, succeeding

from autobatch.store import NewMeasurement
from autobatch_server import schemas
from autobatch_server.openapi import describe_interface

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from schemathesis import Case, CheckContext, Response
    from service_fakes import RunningService

# What a schema cannot say, so that a request that keeps to it is refused all the same: by operation, the codes
# that may be answered.
REFUSALS: Mapping[str, frozenset[str]] = {
    # A target that no plan of these world_size, split and multiple_of hits; parameters within a workload's name; a family of
    # cards; a target below world_size, or a multiple_of above a rank's share.
    "GET /v1/plan": frozenset({"no-plan", "bad-parameter", "ambiguous-gpu", "invalid-request"}),
    # Parameters that the workload does not declare; a family of cards.
    "POST /v1/placements": frozenset({"bad-parameter", "ambiguous-gpu"}),
    # As for the plan, and an Idempotency-Key that came before with another body.
    "POST /v1/probes": frozenset({"no-plan", "bad-parameter", "ambiguous-gpu", "invalid-request", "key-reused"}),
    # A family of cards.
    "GET /v1/measurements": frozenset({"ambiguous-gpu"}),
    # A report whose fields contradict each other; parameters that the workload does not declare; a family of cards; in
    # fields that a later version may have added, what I-JSON allows nowhere: an integer beyond 2^53 - 1, or NUL.
    "POST /v1/measurements": frozenset({"invalid-report", "bad-parameter", "ambiguous-gpu", "malformed-json"}),
    # A Pod is any object, and what I-JSON allows nowhere may stand anywhere in it.
    "POST /v1/kubernetes/mutate": frozenset({"malformed-json"}),
}
# schemathesis takes the null id of an answer without a probe for a probe's id, and asks for the probe "null".
OF_ONE_PROBE = ("GET /v1/probes/{probe_id}", "GET /v1/probes/{probe_id}/events", "POST /v1/probes/{probe_id}/cancel")
# A real card may be asked for where no runner has one: that is 503, and it is meant.
UNAVAILABLE: Mapping[str, frozenset[str]] = {"POST /v1/probes": frozenset({"no-matching-runner"})}
# `invalid-request` is also what the framework answers; these are the sentences of ours behind it.
CONTRADICTIONS = ("multiple_of ", "target ")
EVERY_CHECK = frozenset(
    {
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
        "positive_data_acceptance",
        "negative_data_rejection",
        "use_after_free",
        "ensure_resource_availability",
        "missing_required_header",
        "ignored_auth",
        "object_level_authorization",
        "unsupported_method",
        "allow_header_conformance",
    }
)
_PROBLEM = "application/problem+json"


def refused_by_name(context: CheckContext, response: Response, case: Case) -> None:
    """Whatever is let through below as an expected status is let through for its code alone; every error is a problem."""
    if response.status_code < 400:
        return
    assert response.headers["content-type"] == [_PROBLEM], f"{response.status_code} is no problem document"
    if response.request.method == "HEAD":
        return
    problem = json.loads(response.text)
    assert problem["status"] == response.status_code
    name = case.operation.label
    if response.status_code >= 500:
        assert problem["code"] in UNAVAILABLE.get(name, ()), problem
    if name in OF_ONE_PROBE and "/v1/probes/null" in response.request.url:
        assert problem["code"] in {"invalid-request", "unauthenticated", "forbidden"}
    elif response.status_code in {400, 422} and case.meta is not None and case.meta.generation.mode.is_positive:
        assert problem["code"] in REFUSALS.get(name, ()), problem
        if problem["code"] == "invalid-request":
            assert problem["detail"].startswith(CONTRADICTIONS), problem


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """The check of this file, for as long as its tests run."""
    schemathesis.check(refused_by_name)
    yield
    schemathesis.checks.CHECKS.unregister("refused_by_name")


def operations() -> list[dict[str, Any]]:
    """Expected statuses beyond schemathesis' own, by operation; `refused_by_name` holds each to its codes."""
    accepted = ["2xx", "3xx", "401", "403", "404", "409", "429", "5xx"]
    configured: list[dict[str, Any]] = [
        {"include-name": name, "checks": {"positive_data_acceptance": {"expected-statuses": [*accepted, "422"]}}}
        for name in OF_ONE_PROBE
    ]
    for name in REFUSALS:
        also = ["400", "422"] if "malformed-json" in REFUSALS[name] else ["422"]
        checks: dict[str, Any] = {"positive_data_acceptance": {"expected-statuses": [*accepted, *also]}}
        if name in UNAVAILABLE:
            checks["not_a_server_error"] = {"expected-statuses": ["2xx", "3xx", "4xx", "503"]}
        configured.append({"include-name": name, "checks": checks})
    return configured


@dataclass
class Outcome:
    """What a run found."""

    num_cases: int = 0
    checks: Counter[str] = field(default_factory=Counter)
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def read(self, event: Any) -> None:
        """Take in an event of the engine."""
        if isinstance(event, events.NonFatalError):
            self.failures.append(f"{event.label}: {event.info.format()}")
        elif isinstance(event, events.FatalError):
            self.failures.append(f"schemathesis itself failed: {event.exception!r}")
        elif isinstance(event, events.ScenarioFinished):
            for case_id, results in event.recorder.checks.items():
                self._read_case(event.recorder, case_id, results)

    def _read_case(self, recorder: Any, case_id: str, results: list[Any]) -> None:
        self.num_cases += 1
        interaction = recorder.interactions.get(case_id)
        label = recorder.cases[case_id].value.operation.label
        answered = interaction.response.status_code if interaction is not None and interaction.response else 0
        self.statuses.setdefault(label, Counter())[answered] += 1
        for result in results:
            self.checks[result.name] += 1
            if result.failure_info is not None:
                told = result.failure_info
                body = interaction.response.text[:400] if interaction is not None and interaction.response else ""
                self.failures.append(
                    f"{label} {result.name}: {told.failure} {told.code_sample[:600]} -> {answered} {body}"
                )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service with tokens and measurements, whose probes succeed within milliseconds."""
    settings = make_settings(tmp_path_factory.mktemp("contract"))
    with running_service(settings, executor=FakeExecutor(succeeding)) as running:
        store = running.services.measurements
        for report in (make_report(extra_trials=[make_trial(1, fits=True)]), make_report(gpu="L4", largest=None)):
            gpu = report.options.emulate or ""
            store.add(NewMeasurement.of(report, workload="gpt2", gpu=gpu, source="reported"), token_id=None)
        probe = running.client.post("/v1/probes", json={"workload": "gpt2", "target": 256, "gpu": "H100-80GB"}).json()
        running.wait_for(probe["id"], "succeeded")
        yield running


@pytest.fixture(scope="module")
def tokens(service: RunningService) -> Mapping[str, str | None]:
    """What each kind of asker sends."""
    make = service.services.tokens.create
    return {
        "none": None,
        "wrong": "abt_0123456789abcdef_" + "x" * 43,
        "narrow": make("narrow", ["plan:read"], seconds=None)[1],
        "full": make("full", ["admin"], seconds=None)[1],
    }


def document_with_ids(service: RunningService) -> dict[str, Any]:
    """The document, with ids that there are in place of those in its examples."""
    text = json.dumps(describe_interface(service.app))
    probe, measurement = service.services.queue.list_probes(limit=1)[0], service.services.measurements.list_newest()[-1]
    for own, there in ((probe.id, "prb"), (measurement.id, "mea")):
        text = re.sub(rf"{there}_[0-9a-f]{{27}}", own, text)
    document: dict[str, Any] = json.loads(text)
    return document


def explore(service: RunningService, token: str | None, *, phases: tuple[str, ...], max_examples: int) -> Outcome:
    """Run phases of schemathesis' engine over the running service."""
    configuration: dict[str, Any] = {
        "seed": 20261120,
        "generation": {"max-examples": max_examples, "deterministic": True, "database": "none"},
        "phases": {name: {"enabled": name in phases} for name in ("examples", "coverage", "fuzzing", "stateful")},
        "operations": operations(),
    }
    if token is not None:
        configuration["headers"] = {"Authorization": f"Bearer {token}"}
    schema = schemathesis.openapi.from_dict(
        document_with_ids(service), config=schemathesis.Config.from_dict(configuration)
    )
    schema.config.update(base_url=service.url)
    outcome = Outcome()
    for event in from_schema(schema).execute():
        outcome.read(event)
    return outcome


@pytest.mark.parametrize("asker", ["none", "wrong", "narrow", "full"])
def test_the_service_keeps_to_its_document(
    service: RunningService, tokens: Mapping[str, str | None], asker: str
) -> None:
    """No check of schemathesis fails, whoever asks; none is switched off, and nobody gets further than the token allows."""
    # The coverage phase makes over a thousand requests: the one who may do everything goes furthest with them.
    phases = ("examples", "coverage", "fuzzing") if asker == "full" else ("examples", "fuzzing")
    outcome = explore(service, tokens[asker], phases=phases, max_examples=4 if asker == "full" else 8)
    assert not outcome.failures, "\n\n".join(outcome.failures[:10])
    assert set(outcome.checks) >= EVERY_CHECK | {"refused_by_name"}
    assert outcome.num_cases > (1000 if asker == "full" else 100)
    closed = {name: found for name, found in outcome.statuses.items() if name not in {"GET /livez", "GET /readyz"}}
    # 409: the probe of a valid id has ended.
    answered = {name for name, found in closed.items() if any(200 <= status < 400 or status == 409 for status in found)}
    if asker in {"none", "wrong"}:
        assert not answered
    elif asker == "narrow":
        reading = {"POST /v1/placements", "POST /v1/kubernetes/mutate"}
        writing = {name for name in closed if not name.startswith("GET ")} - reading
        assert answered
        assert not answered & writing
    else:
        assert answered == set(closed), "some operation was never reached with valid data"


@pytest.mark.slow
def test_sequences_of_requests_keep_to_the_document(service: RunningService, tokens: Mapping[str, str | None]) -> None:
    """The same for sequences: a probe posted, followed, cancelled, a measurement reported and deleted."""
    outcome = explore(service, tokens["full"], phases=("stateful",), max_examples=200)
    assert not outcome.failures, "\n\n".join(outcome.failures[:10])
    assert set(outcome.checks) >= EVERY_CHECK
    assert outcome.statuses["DELETE /v1/measurements/{measurement_id}"][204]


def test_every_body_and_parameter_has_an_example(service: RunningService) -> None:
    """Whoever reads the document sees one for each; headers and security are described."""
    document = describe_interface(service.app)
    components = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            place = f"{method} {path}"
            for parameter in operation.get("parameters", []):
                assert parameter["schema"].get("examples"), f"{place}: {parameter['name']}"
                assert parameter.get("description"), f"{place}: {parameter['name']}"
            bodies = [operation["requestBody"]] if "requestBody" in operation else []
            for status, response in operation["responses"].items():
                assert "X-Request-Id" in response["headers"], f"{place}: {status}"
                bodies.append(response)
            for body in bodies:
                for kind, media in body.get("content", {}).items():
                    assert _has_example(media, components), f"{place}: {kind}"
            is_open = path in {"/livez", "/readyz"}
            assert operation["security"] == ([] if is_open else [{"token": []}, {"session": []}]), place
            assert ("401" in operation["responses"]) is not is_open, place


def _has_example(media: Mapping[str, Any], components: Mapping[str, Any]) -> bool:
    if media.get("example") or media.get("examples"):
        return True
    schema = media.get("schema", {})
    parts = [schema, *schema.get("anyOf", [])]
    names = [part["$ref"].rpartition("/")[2] for part in parts if "$ref" in part]
    return bool(names) and all(components[name].get("examples") for name in names)


def test_every_example_is_of_its_form(service: RunningService) -> None:
    """Each reads back as the form that it stands under, and what may be sent is taken."""
    components = describe_interface(service.app)["components"]["schemas"]
    checked = 0
    for name, component in components.items():
        form = getattr(schemas, name, None)
        for example in component.get("examples", []) if form is not None else []:
            form.model_validate(example)
            checked += 1
    assert checked >= 12


def test_the_examples_of_requests_are_taken(service: RunningService, tokens: Mapping[str, str | None]) -> None:
    """Sent as they stand, each is answered with success."""
    document = describe_interface(service.app)
    headers = {"Authorization": f"Bearer {tokens['full']}"}
    sent = 0
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if "requestBody" not in operation:
                continue
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            for example in document["components"]["schemas"][reference.rpartition("/")[2]]["examples"]:
                response = service.client.post(path, json=example, headers=headers)
                assert response.is_success, (path, response.text)
                sent += 1
    assert sent >= 4


def test_headers_that_matter_are_described(service: RunningService) -> None:
    """Location, ETag, Retry-After, WWW-Authenticate and Allow each stand where they are sent."""
    document = describe_interface(service.app)
    paths = document["paths"]
    assert "Location" in paths["/v1/probes"]["post"]["responses"]["202"]["headers"]
    assert "Retry-After" in paths["/v1/probes"]["post"]["responses"]["429"]["headers"]
    plan = paths["/v1/plan"]["get"]["responses"]
    assert "ETag" in plan["200"]["headers"]
    assert "ETag" in plan["304"]["headers"]
    assert "content" not in plan["304"]
    assert "WWW-Authenticate" in plan["401"]["headers"]
    assert "Retry-After" in plan["503"]["headers"]
    assert "Allow" in document["components"]["responses"]["method-not-allowed"]["headers"]
    stream = paths["/v1/probes/{probe_id}/events"]["get"]["responses"]["200"]["content"]
    assert set(stream) == {"text/event-stream"}
