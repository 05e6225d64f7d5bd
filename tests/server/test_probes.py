"""The operation plane: a probe is asked for, followed, found again, cancelled."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING

import pytest
from service_fakes import FakeExecutor, failing, hanging, make_settings, running_service, succeeding

if TYPE_CHECKING:
    from pathlib import Path

    from service_fakes import RunningService

QUESTION = {"workload": "gpt2", "target": 256, "gpu": "A100-40GB"}


def test_a_probe_runs_and_the_plan_is_known_afterwards(service: RunningService) -> None:
    """Unknown, 202 with a Location, succeeded, and then the same query has the plan."""
    query = "/v1/plan?workload=gpt2&gpu=A100-40GB&target=256"
    assert service.client.get(query).json()["verdict"] == "unknown"
    accepted = service.client.post("/v1/probes", json=QUESTION)
    assert accepted.status_code == 202
    location = accepted.headers["location"]
    assert location == f"/v1/probes/{accepted.json()['id']}"
    ended = service.client.get(location, params={"wait": 20}).json()
    assert ended["state"] == "succeeded"
    assert ended["plan"]["micro_batch_sizes"] == [32] * 8
    answer = service.client.get(query).json()
    assert answer["verdict"] == "fits"
    assert answer["basis"] == "emulated"
    assert answer["measurement"] == ended["measurement"]
    assert answer["plan"] == ended["plan"]


def test_a_fresh_measurement_answers_without_a_run_unless_forced(service: RunningService) -> None:
    """The second probe for a known answer is 200, also for another target within the bounds; force runs it."""
    first = service.client.post("/v1/probes", json=QUESTION).json()
    service.wait_for(first["id"], "succeeded")
    again = service.client.post("/v1/probes", json=QUESTION | {"target": 512, "world_size": 2})
    assert again.status_code == 200
    assert again.json()["id"] is None
    assert again.json()["plan"]["effective_batch_size"] == 512
    forced = service.client.post("/v1/probes", json=QUESTION | {"force": True})
    assert forced.status_code == 202


def test_the_last_event_is_streamed_though_the_probe_ends_while_events_are_read(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that looked for events just before the end still sends the end."""
    queue = service.services.queue
    probe = service.client.post("/v1/probes", json=QUESTION).json()
    service.wait_for(probe["id"], "succeeded")
    look, get = queue.events_after, queue.get
    before_the_end = [look(probe["id"], 0)[:-1], []]
    running = dataclasses.replace(get(probe["id"]), state="running")  # type: ignore[type-var]
    # The probe ends as soon as the second look has found nothing new.
    monkeypatch.setattr(
        queue, "events_after", lambda one, number: before_the_end.pop(0) if before_the_end else look(one, number)
    )
    monkeypatch.setattr(queue, "get", lambda one: running if before_the_end else get(one))
    with service.client.stream("GET", f"/v1/probes/{probe['id']}/events") as response:
        kinds = [line[7:] for line in response.iter_lines() if line.startswith("event: ")]
    assert kinds[-1] == "succeeded"


def test_events_are_streamed_in_order_and_resumed(service: RunningService) -> None:
    """Each event has the next number; with Last-Event-ID only later ones come; the stream ends with the probe."""
    probe = service.client.post("/v1/probes", json=QUESTION).json()
    with service.client.stream("GET", f"/v1/probes/{probe['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    assert [event["kind"] for event in events] == ["queued", "started", "trial_started", "trial_ended", "succeeded"]
    url = f"/v1/probes/{probe['id']}/events"
    with service.client.stream("GET", url, headers={"Last-Event-ID": "3"}) as response:
        later = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert later == events[3:]


def test_the_same_key_is_the_same_probe_and_another_body_is_refused(service: RunningService) -> None:
    """As the IETF draft has it: a replay is answered with the first probe, a key with another body is 422."""
    headers = {"Idempotency-Key": '"8e03978e-40d5"'}
    first = service.client.post("/v1/probes", json=QUESTION, headers=headers)
    second = service.client.post("/v1/probes", json=dict(reversed(QUESTION.items())), headers=headers)
    assert second.status_code == 202
    assert first.json()["id"] == second.json()["id"]
    other = service.client.post("/v1/probes", json=QUESTION | {"target": 128}, headers=headers)
    assert other.status_code == 422
    assert other.json()["code"] == "key-reused"
    assert len(service.client.get("/v1/probes").json()["probes"]) == 1


def test_a_queued_probe_is_cancelled_at_once_and_a_running_one_soon(tmp_path: Path) -> None:
    """With one slot the second waits; both end as cancelled, and the run is ended."""
    executor = FakeExecutor(hanging)
    with running_service(make_settings(tmp_path), executor=executor) as service:
        running = service.client.post("/v1/probes", json=QUESTION).json()["id"]
        service.wait_for(running, "running")
        waiting = service.client.post("/v1/probes", json=QUESTION | {"gpu": "L4"}).json()["id"]
        assert service.client.post(f"/v1/probes/{waiting}/cancel").json()["state"] == "cancelled"
        assert service.client.post(f"/v1/probes/{running}/cancel").status_code == 202
        service.wait_for(running, "cancelled", seconds=5)
        assert executor.started[0].ended.is_set()
        late = service.client.post(f"/v1/probes/{running}/cancel")
        assert late.status_code == 409
        assert late.json()["code"] == "already-ended"


def test_a_failed_probe_names_a_code_and_nothing_of_the_inside(tmp_path: Path) -> None:
    """What the job raised stays in the log."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(failing)) as service:
        probe = service.client.post("/v1/probes", json=QUESTION).json()
        ended = service.wait_for(probe["id"], "failed")
    assert ended["problem"]["code"] == "workload-failed"
    assert "/secret/path" not in json.dumps(ended)


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    """429 with Retry-After, naming both numbers; nothing is queued."""
    settings = make_settings(tmp_path, queue_limit=2)
    with running_service(settings, executor=FakeExecutor(hanging)) as service:
        running = service.client.post("/v1/probes", json=QUESTION).json()["id"]
        service.wait_for(running, "running")
        for _ in range(2):
            assert service.client.post("/v1/probes", json=QUESTION).status_code == 202
        refused = service.client.post("/v1/probes", json=QUESTION)
        assert refused.status_code == 429
        assert refused.json()["code"] == "queue-full"
        assert "2 probes are waiting, the limit is 2" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) > 0
        assert len(service.client.get("/v1/probes").json()["probes"]) == 3


def test_one_probe_for_each_slot_at_a_time(tmp_path: Path) -> None:
    """With one slot nothing runs beside a running probe."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(hanging)) as service:
        for _ in range(3):
            service.client.post("/v1/probes", json=QUESTION)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            states = [probe["state"] for probe in service.client.get("/v1/probes").json()["probes"]]
            assert states.count("running") <= 1
            time.sleep(0.05)
        assert states.count("running") == 1


def test_a_probe_that_passes_its_deadline_fails_by_name(tmp_path: Path) -> None:
    """A run that hangs is ended after its deadline and a grace."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(hanging)) as service:
        probe = service.client.post("/v1/probes", json=QUESTION | {"deadline": 0.2}).json()
        ended = service.wait_for(probe["id"], "failed", seconds=15)
    assert ended["problem"]["code"] == "deadline-passed"


@pytest.mark.parametrize("wait", [0.5, 5])
def test_a_poll_waits_for_news_but_not_longer_than_asked(tmp_path: Path, wait: float) -> None:
    """With `after`, it comes back at the first later event; without news, when the time is up."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding, pause=0.3)) as service:
        probe = service.client.post("/v1/probes", json=QUESTION).json()
        started = time.monotonic()
        seen = service.client.get(f"/v1/probes/{probe['id']}", params={"wait": wait, "after": 1}).json()
        assert seen["last_event"] > 1
        assert time.monotonic() - started < wait + 2
