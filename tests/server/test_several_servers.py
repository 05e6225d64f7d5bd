"""Several servers on one database: they share the queue, any of them answers and tells of any probe, and one may die."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import random
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest
from service_fakes import make_report
from service_storm import Nursery, check_ledger, free_port, processes_of, wait_until
from sqlalchemy import select

from autobatch import Evidence, ProbeOptions
from autobatch.store import MeasurementStore, NewMeasurement
from autobatch_server.database import open_database
from autobatch_server.execution import end_orphans
from autobatch_server.queue import ENDED
from autobatch_server.tables import event, probe

if TYPE_CHECKING:
    from pathlib import Path

CARDS = ("A100-SXM4-40GB", "H100-SXM5-80GB", "A10", "T4")
LARGEST = {"A100-SXM4-40GB": 37, "H100-SXM5-80GB": 76, "A10": 20, "T4": 7}
TARGETS = range(8, 520, 3)


def expected_answers() -> dict[tuple[str, int], tuple[str, int | None]]:
    """Verdict and micro-batch for each question, as the library says from the same report."""
    answers = {}
    for gpu in CARDS:
        report = make_report(gpu=gpu, largest=LARGEST[gpu])
        evidence = Evidence(report.trials, budget_bytes=report.memory.budget_bytes)
        for target in TARGETS:
            answer = evidence.answer(ProbeOptions(target=target))
            answers[gpu, target] = (answer.verdict, answer.plan.micro_batch_size if answer.plan else None)
    return answers


class Askers:
    """Threads that put questions to all servers in turn, and go on to the next one where one is gone."""

    def __init__(self, urls: list[str], number: int) -> None:
        self.urls = urls
        self.wrong: list[str] = []
        self.answered: collections.Counter[str] = collections.Counter()
        self.refused = 0
        self._left = itertools.count()
        self._number = number
        self._expected = expected_answers()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(4)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *ending: object) -> None:
        for thread in self._threads:
            thread.join(300)

    def _run(self, seed: int) -> None:
        dice = random.Random(seed)
        questions = list(self._expected)
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(httpx.Client(base_url=url, timeout=20, trust_env=False)) for url in self.urls
            ]
            while next(self._left) < self._number:
                gpu, target = dice.choice(questions)
                while True:
                    client = dice.choice(clients)
                    try:
                        answer = client.get("/v1/plan", params={"workload": "resnet50", "gpu": gpu, "target": target})
                    except httpx.TransportError:  # the server that was killed: another one knows too
                        self.refused += 1
                        continue
                    break
                self._check(str(client.base_url), gpu, target, answer)

    def _check(self, url: str, gpu: str, target: int, answer: httpx.Response) -> None:
        self.answered[url] += 1
        if answer.status_code != 200:
            self.wrong.append(f"{answer.status_code} {answer.text[:200]}")
            return
        form = answer.json()
        got = (form["verdict"], form["plan"] and form["plan"]["micro_batch_size"])
        if got != self._expected[gpu, target]:
            self.wrong.append(f"{gpu}, target {target}: {got}, expected {self._expected[gpu, target]}")


def submit_all(urls: list[str], bodies: list[dict[str, Any]], numbers: range) -> dict[str, str]:
    """Submit each body to a server of its turn, again to the next under the same key until it is accepted."""
    accepted = {}
    with httpx.Client(timeout=20, trust_env=False) as client:
        for number in numbers:
            body = bodies[number]
            until = time.monotonic() + 60
            for url in itertools.islice(itertools.cycle(urls), number, None):
                assert time.monotonic() < until, f"probe {number} was not accepted"
                with contextlib.suppress(httpx.TransportError):
                    answer = client.post(f"{url}/v1/probes", json=body, headers={"Idempotency-Key": f"key-{number}"})
                    if answer.status_code == 202:
                        accepted[f"key-{number}"] = answer.json()["id"]
                        break
                    assert answer.status_code in {429, 503}, answer.text
                time.sleep(0.05)
    return accepted


def told(url: str, probe_id: str) -> list[tuple[int, str]]:
    """The events of a probe as a server streams them: numbers and kinds."""
    found = []
    with (
        httpx.Client(timeout=20, trust_env=False) as client,
        client.stream("GET", f"{url}/v1/probes/{probe_id}/events") as stream,
    ):
        for line in stream.iter_lines():
            if line.startswith("data:"):
                form = json.loads(line.removeprefix("data:"))
                found.append((form["number"], form["kind"]))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_servers_on_one_postgresql(postgresql: Any, tmp_path: Path) -> None:
    """10,000 questions and 100 probes over four servers, of which one is killed: nothing lost, nothing twice, nothing wrong."""
    ports = [free_port() for _ in range(4)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    bodies = [{"workload": "gpt2", "gpu": "L4", "force": True, "target": 64 + number} for number in range(100)]
    log = tmp_path / "servers.log"
    with postgresql.new_database() as url, contextlib.ExitStack() as stack:
        with open_database(url) as database:
            for gpu in CARDS:
                report = make_report(gpu=gpu, largest=LARGEST[gpu], workload="resnet50")
                new = NewMeasurement.of(report, workload="resnet50", gpu=gpu, source="reported")
                MeasurementStore(database).add(new, token_id=None)
        base = {"database_url": url, "lease": 2.0, "max_attempts": 100, "real_gpus": False, "log_level": "WARNING"}
        base |= {"emulated_slots": 1, "queue_limit": 200}
        stack.callback(lambda: print(log.read_text()[-4000:] if log.exists() else ""))
        nursery = stack.enter_context(Nursery(base=base, log=log))
        servers = [nursery.fork(port=port) for port in ports]
        for address in urls:
            wait_until(lambda address=address: _answers(address), 30, f"{address} does not answer")
        began = time.monotonic()
        with Askers(urls, 10_000) as askers:
            accepted = submit_all(urls, bodies, range(50))
            nursery.kill(servers[0])
            accepted |= submit_all(urls, bodies, range(50, 100))
        seconds = time.monotonic() - began
        with open_database(url) as database:

            def all_ended() -> bool:
                with database.read() as connection:
                    return not connection.execute(select(probe.c.id).where(probe.c.state.not_in(ENDED)).limit(1)).all()

            wait_until(all_ended, 60, "a probe has not ended")
            with database.read() as connection:
                kept = {
                    probe_id: [(row.number, row.kind) for row in rows]
                    for probe_id, rows in itertools.groupby(
                        connection.execute(select(event).order_by(event.c.probe_id, event.c.number)),
                        key=lambda row: row.probe_id,
                    )
                }
        assert askers.wrong == []
        assert sum(askers.answered.values()) == 10_000
        assert all(askers.answered[address] > 1000 for address in urls[1:]), askers.answered
        assert askers.refused > 0  # the killed one was asked too
        for number, probe_id in enumerate(accepted.values()):  # whoever ran it and whoever took it
            assert told(urls[1 + number % 3], probe_id) == kept[probe_id]
        check_ledger(url, accepted, bodies)
        print(f"{10_000 / seconds:.0f} questions a second over 4 servers beside {len(bodies)} probes")
        for server in servers[1:]:
            nursery.end(server)
    end_orphans()
    assert processes_of(accepted.values()) == []
    assert "Traceback (most recent" not in log.read_text()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    return False
