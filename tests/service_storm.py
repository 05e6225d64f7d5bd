"""What kills and counts services: a nursery of processes, and the ledger of what they were to do."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
from sqlalchemy import select

from autobatch import Report
from autobatch.store import measurement
from autobatch_server.database import open_database
from autobatch_server.queue import ENDED
from autobatch_server.tables import event, probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FAILING_TARGET, SLOW_TARGET = 7, 13  # as storm_worker.py has them
_ROOT = Path(__file__).resolve().parents[1]
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
                [sys.executable, str(_ROOT / "tests/server/storm_worker.py"), json.dumps(self.base)],
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


def free_port() -> int:
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
