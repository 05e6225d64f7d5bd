"""The processes of the storm: a nursery that has everything imported, and what it forks: workers and servers.

Run as a script with the settings as its argument; each line of its input asks for a process, each line of its output is the
process's id. A forked process is up within milliseconds, and is killed like any other.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alembic.command  # noqa: F401 - so that it is there before the fork
from service_fakes import failing, succeeding

from autobatch_server.execution import ChildExecutor, ProbeTask
from autobatch_server.serving import serve
from autobatch_server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

FAILING_TARGET = 7
"""A probe for this target fails, each time it is run."""
SLOW_TARGET = 13
"""A probe for this target takes longer than a lease: a paused worker that wakes finds another at work on its probe."""
_CHILD = ["sleep", "300"]


def fence_of(task: ProbeTask) -> str:
    """What a report says in the place of torch's version: under which lease it was made."""
    return f"{task.claim.fence}.0"


@dataclass
class StormExecution:
    """A run of some ten milliseconds beside a real process, which does not die with its parent."""

    task: ProbeTask
    environment: dict[str, str]
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        bad = self.task.options["target"] == FAILING_TARGET
        self.messages = failing(self.task) if bad else succeeding(self.task)
        if not bad:
            self.messages[-1]["report"]["versions"]["torch"] = fence_of(self.task)  # type: ignore[index]
        self.process = subprocess.Popen(_CHILD, env=self.environment, start_new_session=True)
        return self

    def __exit__(self, *ending: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def next_message(self, seconds: float) -> Mapping[str, Any] | None:
        """The next message, mostly within 60 ms; that it died, where somebody killed it."""
        del seconds
        slow = self.task.options["target"] == SLOW_TARGET
        time.sleep(random.uniform(0.3, 0.7) if slow else random.uniform(0.005, 0.06))
        if self.process is None or self.process.poll() is not None:
            return {"died": {"status": -9, "log": ""}}
        return self.messages.pop(0)


class StormExecutor:
    """Starts such runs, marked as real ones are."""

    def start(self, task: ProbeTask) -> StormExecution:
        """Prepare a run."""
        return StormExecution(task=task, environment=ChildExecutor(memory_limit_bytes=2**40).environment(task))


def main() -> None:
    """Fork what is asked for, until the input ends."""
    base = json.loads(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody is to wait for the dead
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(Settings(**{**base, **asked["settings"]}), fake=asked["fake"])
        print(pid, flush=True)


def _become(settings: Settings, *, fake: bool) -> NoReturn:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no longer than the nursery
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    status = 1
    try:
        status = serve(settings, executor=StormExecutor() if fake else None)
    except BaseException:  # noqa: BLE001 - it ends here, and the log must say why
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
