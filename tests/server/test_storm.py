"""The storm: workers, servers and runs are killed at random moments, and nothing accepted is lost or finished twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil
import pytest
from sqlalchemy import select

from autobatch import Report
from autobatch.emulator.launch import open_machine
from autobatch.store import measurement
from autobatch_server.database import open_database
from autobatch_server.execution import end_orphans
from autobatch_server.queue import ENDED
from autobatch_server.tables import event, probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FAILING_TARGET, SLOW_TARGET = 7, 13  # as storm_worker.py has them
LEASE = 1.0
_ROOT = Path(__file__).resolve().parents[2]
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked into, not written to
_MARK = b"AUTOBATCH_SERVER_PROBE="


@dataclass
class Nursery:
    """Forks workers and servers; a context manager that ends all of them."""

    base: dict[str, Any]
    log: Path
    fake: bool = True
    _process: subprocess.Popen[str] | None = None
    _asking: threading.Lock = field(default_factory=threading.Lock)
    living: set[int] = field(default_factory=set)

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("storm_worker.py")), json.dumps(self.base)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": f"{_ROOT}:{_ROOT / 'server'}"},
            )
        return self

    def __exit__(self, *ending: object) -> None:
        for pid in list(self.living):
            self.kill(pid)
        if self._process is not None:
            self._process.communicate()

    def fork(self, **settings: Any) -> int:
        """Start a process with these settings."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with self._asking:
            process.stdin.write(json.dumps({"settings": settings, "fake": self.fake}) + "\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())
        self.living.add(pid)
        return pid

    def kill(self, pid: int) -> None:
        """Kill -9, and wait until it is gone."""
        self.living.discard(pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            dying = psutil.Process(pid)
            dying.kill()
            dying.wait(10)

    def end(self, pid: int) -> None:
        """Ask it to end, as an init system does."""
        self.living.discard(pid)
        dying = psutil.Process(pid)
        dying.terminate()
        dying.wait(20)


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


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def processes_of(probe_ids: Iterable[str]) -> list[int]:
    """Every process that carries the mark of one of these probes."""
    marks = [_MARK + probe_id.encode() for probe_id in probe_ids]
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                environment = (entry / "environ").read_bytes()
                if _MARK in environment and any(mark in environment for mark in marks):
                    found.append(int(entry.name))
    return found


def wait_until(is_so: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something, not for ever."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, f"{what} after {seconds:g} s"
        time.sleep(0.1)


def check_ledger(
    url: str,
    accepted: dict[str, str],
    bodies: list[dict[str, Any]],
    *,
    told_fences: bool = True,
    killed_children_fail: bool = False,
) -> None:
    """Every accepted probe ended exactly once, by the run that held it, and was accepted once."""
    with open_database(url) as database, database.read() as connection:
        probes = {row.id: row for row in connection.execute(select(probe))}
        events: dict[str, list[Any]] = {}
        for row in connection.execute(select(event).order_by(event.c.probe_id, event.c.number)):
            events.setdefault(row.probe_id, []).append(row)
        measurements: dict[str, list[Any]] = {}
        for row in connection.execute(select(measurement)):
            measurements.setdefault(row.probe_id, []).append(row)
    assert len(accepted) == len(bodies)
    assert len(set(accepted.values())) == len(bodies), "two keys stand for one probe"
    assert set(probes) == set(accepted.values()), "a probe is there that nobody was told of, or one is missing"
    for key, probe_id in accepted.items():
        row, happened, kept = probes[probe_id], events[probe_id], measurements.get(probe_id, [])
        kinds = [entry.kind for entry in happened]
        assert [entry.number for entry in happened] == list(range(1, len(happened) + 1))
        ends = [kind for kind in kinds if kind in ENDED]
        assert ends == [row.state], f"{probe_id}: {kinds}"
        assert kinds[-1] == row.state, f"{probe_id}: something was written after its end: {kinds}"
        bad = bodies[int(key.removeprefix("key-"))]["target"] == FAILING_TARGET
        bad |= killed_children_fail and row.state == "failed" and '"workload-failed"' in row.problem_json
        allowed = {"failed" if bad else "succeeded"} | (
            {"cancelled"} if "cancel_requested" in kinds or len(kinds) == 2 else set()
        )
        assert row.state in allowed, f"{probe_id}: {row.state} {row.problem_json}"
        assert kinds.count("started") == row.fence
        assert len(kept) == (1 if row.state == "succeeded" else 0)
        for found in kept:
            assert found.id == row.measurement_id
            if told_fences:
                made_under = Report.from_dict(json.loads(found.report_json)).versions.torch
                assert made_under == f"{row.fence}.0", (
                    f"{probe_id}: the lease was {row.fence}, the result is of {made_under}"
                )


def test_nothing_is_lost_and_nothing_finished_twice(database_url: str, tmp_path: Path) -> None:
    """200 probes, 4 workers, a server; kill -9 of each kind, pauses longer than a lease: each probe ends once, as it should."""
    kills_wanted, number = 40, 200
    port = _free_port()
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
    with Nursery(base=base, log=log) as nursery:
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
        assert min(weather.kills.values()) >= 3, weather.kills
        with open_database(database_url) as database, contextlib.ExitStack() as stack:
            stack.callback(lambda: print(log.read_text()[-6000:]))  # shown where the test fails

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
    port = _free_port()
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
    assert set(Path(tempfile.gettempdir()).glob("autobatch-*")) <= before[1]
    check_ledger(url, client.accepted, bodies, told_fences=False, killed_children_fail=True)
