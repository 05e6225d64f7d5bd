"""The storm: workers, servers and runs are killed at random moments, and nothing accepted is lost or finished twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from service_storm import (
    FAILING_TARGET,
    SLOW_TARGET,
    Nursery,
    check_ledger,
    free_port,
    processes_of,
    wait_until,
)
from sqlalchemy import select

from autobatch.emulator.launch import open_machine
from autobatch_server.database import open_database
from autobatch_server.execution import end_orphans
from autobatch_server.queue import ENDED
from autobatch_server.tables import probe

LEASE = 1.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked into, not written to


@dataclass
class Client:
    """Submits probes over HTTP until each is accepted, whatever stands in the way."""

    url: str
    bodies: list[dict[str, Any]]
    accepted: dict[str, str] = field(default_factory=dict)
    """Probe ids by idempotency key."""
    surprises: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Submit them all; each under a key of its own, sent again until there is an answer."""
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as client:
            for number, body in enumerate(self.bodies):
                self._submit(client, number, body)

    def _submit(self, client: httpx.Client, number: int, body: dict[str, Any]) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                answer = client.post("/v1/probes", json=body, headers={"Idempotency-Key": f"key-{number}"})
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code == 202:
                self.accepted[f"key-{number}"] = answer.json()["id"]
                return
            if answer.status_code not in {429, 503}:
                self.surprises.append(answer.text)
                return
            time.sleep(0.1)

    def cancel(self, key: str) -> None:
        """Cancel a probe, if the server is there and the probe has not ended."""
        with contextlib.suppress(httpx.TransportError):
            httpx.post(f"{self.url}/v1/probes/{self.accepted[key]}/cancel", timeout=5, trust_env=False)


@dataclass
class Weather:
    """Kills and pauses processes at seeded random moments."""

    nursery: Nursery
    worker_settings: dict[str, Any]
    server_settings: dict[str, Any]
    workers: list[int]
    server: int
    random: random.Random
    kills: dict[str, int] = field(default_factory=lambda: {"worker": 0, "server": 0, "child": 0})
    paused: dict[int, float] = field(default_factory=dict)
    """When each paused worker goes on."""

    def strike(self) -> None:
        """Do one thing of many."""
        what = self.random.choices(["worker", "server", "child", "pause"], weights=[4, 3, 4, 4])[0]
        getattr(self, f"_strike_{what}")()
        self.wake()

    def strike_by_turn(self, index: int) -> None:
        """Kill a child, a worker, a child, a server, and so on."""
        (self._strike_child, self._strike_worker, self._strike_child, self._strike_server)[index % 4]()

    def wake(self, *, all_of_them: bool = False) -> None:
        """Let paused workers go on whose time has come: by then another has their probe."""
        for pid, moment in list(self.paused.items()):
            if all_of_them or time.monotonic() > moment:
                del self.paused[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _strike_worker(self) -> None:
        place = self.random.randrange(len(self.workers))
        self.paused.pop(self.workers[place], None)
        self.nursery.kill(self.workers[place])
        self.workers[place] = self.nursery.fork(**self.worker_settings)
        self.kills["worker"] += 1

    def _strike_server(self) -> None:
        self.nursery.kill(self.server)
        self.server = self.nursery.fork(**self.server_settings)
        self.kills["server"] += 1

    def _strike_child(self) -> None:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            below = [child for pid in self.workers if pid not in self.paused for child in _children(pid)]
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                self.random.choice(below).kill()
                self.kills["child"] += 1
                return
            time.sleep(0.01)

    def _strike_pause(self) -> None:
        pid = self.random.choice(self.workers)
        if pid not in self.paused and len(self.paused) < 2:
            os.kill(pid, signal.SIGSTOP)
            self.paused[pid] = time.monotonic() + LEASE * 1.6


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize(
    ("number", "kills_wanted"), [(110, 20), pytest.param(200, 40, marks=pytest.mark.slow)], ids=["breeze", "storm"]
)
def test_nothing_is_lost_and_nothing_finished_twice(
    number: int, kills_wanted: int, database_url: str, tmp_path: Path
) -> None:
    """Many probes, 4 workers, a server; kill -9 of each kind, pauses longer than a lease: each probe ends once, as it should."""
    port = free_port()
    bodies = [
        {
            "workload": "gpt2",
            "gpu": "L4",
            "force": True,
            "target": {9: FAILING_TARGET, 4: SLOW_TARGET}.get(index % 10, 64 + index),
        }
        for index in range(number)
    ]
    base = {"database_url": database_url, "lease": LEASE, "max_attempts": 100, "real_gpus": False, "port": port}
    base |= {"queue_limit": 60, "log_level": "WARNING"}
    worker = {"serve_http": False, "emulated_slots": 1}
    server = {"run_probes": False}
    log = tmp_path / "storm.log"
    with contextlib.ExitStack() as stack, Nursery(base=base, log=log) as nursery:
        stack.callback(lambda: print(log.read_text()[-6000:]))  # shown where the test fails
        weather = Weather(
            nursery=nursery,
            worker_settings=worker,
            server_settings=server,
            workers=[nursery.fork(**worker) for _ in range(4)],
            server=nursery.fork(**server),
            random=random.Random(20261121),
        )
        client = Client(url=f"http://127.0.0.1:{port}", bodies=bodies)
        submitting = threading.Thread(target=client.run)
        submitting.start()
        try:
            dice = random.Random(7)
            while sum(weather.kills.values()) < kills_wanted:
                time.sleep(dice.uniform(0.1, 0.7))
                weather.strike()
                if dice.random() < 0.1 and client.accepted:
                    client.cancel(dice.choice(list(client.accepted)))
        finally:
            weather.wake(all_of_them=True)
            submitting.join(70)
        assert client.surprises == []
        assert min(weather.kills.values()) >= kills_wanted // 13, weather.kills
        with open_database(database_url) as database:

            def all_ended() -> bool:
                with database.read() as connection:
                    return not connection.execute(select(probe.c.id).where(probe.c.state.not_in(ENDED)).limit(1)).all()

            wait_until(all_ended, 40, "a probe has not ended")
        check_ledger(database_url, client.accepted, bodies)
        for pid in (*weather.workers, weather.server):
            nursery.end(pid)
    end_orphans()
    assert processes_of(client.accepted.values()) == []
    assert "Traceback (most recent" not in log.read_text()


@pytest.mark.slow
def test_real_runs_leave_nothing_behind_however_they_are_killed(tmp_path: Path, libraries: object) -> None:
    """12 probes on the emulated card; workers, their children and grandchildren are killed: each ends once, nothing stays."""
    del libraries  # compiled before the storm, not by each of its children
    url = f"sqlite:///{tmp_path / 'storm.sqlite3'}"
    port = free_port()
    bodies = [
        {"workload": "gpt2", "gpu": "L4", "force": True, "target": 20 + index, "parameters": {"seq_len": 64}}
        for index in range(12)
    ]
    base = {
        "database_url": url,
        "lease": 3.0,
        "max_attempts": 100,
        "real_gpus": False,
        "port": port,
        "log_level": "WARNING",
    }
    worker, server = {"serve_http": False, "emulated_slots": 1}, {"run_probes": False}
    before = set(_SHARED_MEMORY.glob("autobatch-gpu-*")), set(Path(tempfile.gettempdir()).glob("autobatch-*"))
    log = tmp_path / "storm.log"
    with Nursery(base=base, log=log, fake=False) as nursery:
        weather = Weather(
            nursery=nursery,
            worker_settings=worker,
            server_settings=server,
            workers=[nursery.fork(**worker) for _ in range(2)],
            server=nursery.fork(**server),
            random=random.Random(3),
        )
        client = Client(url=f"http://127.0.0.1:{port}", bodies=bodies)
        client.run()
        assert client.surprises == []
        dice = random.Random(5)
        with open_database(url) as database:

            def all_ended() -> bool:
                with database.read() as connection:
                    return not connection.execute(select(probe.c.id).where(probe.c.state.not_in(ENDED)).limit(1)).all()

            for index in range(9):
                time.sleep(dice.uniform(2.0, 7.0))
                weather.strike_by_turn(index)
            wait_until(all_ended, 240, "a probe has not ended")
        for pid in (*weather.workers, weather.server):
            nursery.end(pid)
    end_orphans()
    assert processes_of(client.accepted.values()) == []
    with open_machine(("L4",), tenant_bytes=0):
        pass  # a new machine removes what dead owners left
    left = set(_SHARED_MEMORY.glob("autobatch-gpu-*")) - before[0]
    assert not [
        path for path in left if not psutil.pid_exists(int(path.name.split("-")[2]))
    ]  # the living may be others'
    files = set(Path(tempfile.gettempdir()).glob("autobatch-*")) - set(
        Path(tempfile.gettempdir()).glob("autobatch-postgres-*")
    )
    assert files <= before[1]  # a database that another test has up is none of ours
    check_ledger(url, client.accepted, bodies, told_fences=False, killed_children_fail=True)
