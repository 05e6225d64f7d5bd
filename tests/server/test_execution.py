"""How a probe is run in a process of its own: what it sees, what it says, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from autobatch_server.execution import ChildExecution, ChildExecutor, ProbeTask, end_orphans
from autobatch_server.queue import Claim, Order, ProbeRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_ROOT = Path(__file__).resolve().parents[2]
_MARK = "AUTOBATCH_SERVER_PROBE"
_PROBE_ID = f"prb_test{os.getpid()}"


def task() -> ProbeTask:
    """A run of no probe in particular."""
    record = ProbeRecord(
        id=_PROBE_ID,
        state="running",
        order=Order(workload="gpt2", gpu="L4", basis="emulated", options={}),
        created_at=0.0,
        started_at=0.0,
        ended_at=None,
        attempts=1,
        cancel_requested=False,
        token_id=None,
        measurement_id=None,
        problem=None,
    )
    claim = Claim(record=record, fence=1, owner="one", slot="slot")
    return ProbeTask(claim=claim, library_workload="gpt2", options={"target": 8})


class ScriptedExecution(ChildExecution):
    """A run whose child is a script of the test, started and ended as every child is."""

    script = ""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.script]


@contextlib.contextmanager
def running(script: str, *, memory_limit_bytes: int = 2**40) -> Iterator[ScriptedExecution]:
    """Run a script in the place of the child."""
    execution = ScriptedExecution(task(), ChildExecutor(memory_limit_bytes=memory_limit_bytes))
    execution.script = script
    with execution:
        yield execution


def next_of(execution: ChildExecution, seconds: float = 20.0) -> Mapping[str, Any]:
    """The next message, which must come."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (message := execution.next_message(0.2)) is not None:
            return message
    raise TimeoutError("no message came")


def ours() -> list[int]:
    """Every process that carries this test's mark."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and f"{_MARK}={_PROBE_ID}.".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def lives(pid: int | None) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# A job that starts what is hard to end: each ignores SIGTERM, one left the session, one also lost its environment.
_STUBBORN = """
import json, os, signal, subprocess, sys, time, ctypes
ctypes.CDLL(None).prctl(36, 1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(300)"
pids = []
for environment in (None, {}):
    process = subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True, env=environment, stdout=subprocess.PIPE)
    process.stdout.readline()
    pids.append(process.pid)
if os.fork() == 0:  # a double fork, as daemons do it
    os.setsid()
    if os.fork() == 0:
        time.sleep(300)
    os._exit(0)
print(json.dumps({"event": {"pids": pids}}), flush=True)
time.sleep(300)
"""


def test_a_run_is_ended_with_all_that_it_started() -> None:
    """Forks, new sessions, ignored SIGTERM, an emptied environment: within seconds nothing of them is left."""
    with running(_STUBBORN) as execution:
        pids = [*next_of(execution)["event"]["pids"], execution.pid]
        until = time.monotonic() + 5
        while len(ours()) < 3:  # the double fork takes its time
            assert time.monotonic() < until, "the job's processes do not carry the mark"
            time.sleep(0.02)
        started = time.monotonic()
    assert time.monotonic() - started < 8
    assert ours() == []
    assert not [pid for pid in pids if lives(pid)]


def test_a_child_that_ends_on_being_asked_is_not_waited_for() -> None:
    """SIGTERM comes first, so that it can put its things in order."""
    script = """
import signal, sys, time
def end(*_):
    print("in order", file=sys.stderr, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print('{"event": {}}', flush=True)
time.sleep(300)
"""
    with running(script) as execution:
        next_of(execution)
        started = time.monotonic()
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("import os, sys; os.close(1); import time; time.sleep(300)", None),
        ('import os, sys; sys.stdout.write(\'{"event": {"half\'); sys.stdout.flush(); os.kill(os.getpid(), 9)', -9),
        ("import sys; sys.stderr.write('last words'); sys.exit(3)", 3),
        ("import sys; sys.stdout.write('[' * 40_000_000)", None),
    ],
    ids=["closes stdout", "half a line", "exits", "a line without end"],
)
def test_a_child_that_says_no_more_has_died(script: str, status: int | None) -> None:
    """Whatever way it ends without a report, it is named as dead, with its status where it has one."""
    with running(script) as execution:
        message = next_of(execution)
        assert message["died"]["status"] == status
        if status == 3:
            assert message["died"]["log"] == "last words"


def test_floods_neither_block_the_child_nor_fill_our_memory() -> None:
    """Megabytes on standard error and thousands of messages pass through; the log keeps the end alone."""
    script = """
import sys
for number in range(2000):
    sys.stderr.write("x" * 4096)
    print('{"event": {"number": %d, "filler": "%s"}}' % (number, "y" * 2000), flush=True)
sys.stderr.write("the end")
sys.stderr.close()
print('{"report": {}}', flush=True)
"""
    with running(script) as execution:
        for number in range(2000):
            assert next_of(execution)["event"]["number"] == number
        assert next_of(execution) == {"report": {}}
        assert len(execution.log_text) <= 64 * 1024


def test_a_closed_standard_error_does_not_keep_a_core_busy() -> None:
    """The watcher sleeps while a child with a closed stream works in silence."""
    with running("import os, time; os.close(2); print('{\"event\": {}}', flush=True); time.sleep(300)") as execution:
        next_of(execution)
        used = time.process_time()
        assert execution.next_message(1.0) is None
        assert time.process_time() - used < 0.3


def test_host_memory_is_watched_over_the_whole_family() -> None:
    """A grandchild that allocates counts; address space that is only reserved, as CUDA does, and a busy pipe do not matter."""
    script = """
import mmap, subprocess, sys, time
reserved = mmap.mmap(-1, 2**40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
print('{"event": {}}', flush=True)
sys.stdin.readline()
time.sleep(1.5)
hog = subprocess.Popen([sys.executable, "-c", "held = b'x' * 400_000_000; import time; time.sleep(300)"])
while True:
    print('{"event": {"busy": true}}', flush=True)
    time.sleep(0.05)
"""
    limit = 300_000_000
    with running(script, memory_limit_bytes=limit) as execution:
        next_of(execution)
        assert execution.next_message(1.0) is None
        until = time.monotonic() + 20
        while (message := next_of(execution)) is not None and "over_memory" not in message:
            assert time.monotonic() < until, "the limit was not noticed"
        assert message["over_memory"]["limit_bytes"] == limit
        assert message["over_memory"]["used_bytes"] > limit


def test_the_child_sees_nothing_that_could_be_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is named passes on: neither the service's own settings nor anything else; the operator may name more."""
    monkeypatch.setenv("AUTOBATCH_SERVER_DATABASE_URL", "postgresql://u:opensesame@h/d")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "opensesame")
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    seen = ChildExecutor(memory_limit_bytes=1, environment_names=("HF_HOME",)).environment(task())
    assert "opensesame" not in json.dumps(seen)
    assert seen["HF_HOME"] == "/models"
    assert seen["NCCL_DEBUG"] == "WARN"
    assert "PATH" in seen


def test_a_descriptor_above_1023_is_watched_like_any_other() -> None:
    """A server with a thousand connections open still runs probes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = []
    try:
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        with running("print('{\"event\": {}}', flush=True); import time; time.sleep(300)") as execution:
            assert next_of(execution) == {"event": {}}
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_marks_of_another_form_and_of_living_owners_are_left_alone() -> None:
    """Only what a dead runner started is ended, and a strange value of the variable disturbs nobody."""
    me = psutil.Process()
    dead = subprocess.Popen(["true"])
    dead.wait()
    marks = {
        "strange": "a:b:c:d",
        "living": f"{_PROBE_ID}.1:{me.pid}:{me.create_time():.2f}",
        "orphan": f"{_PROBE_ID}.1:{dead.pid}:1.00",
        "reused": f"{_PROBE_ID}.1:{me.pid}:1.00",
    }
    processes = {name: subprocess.Popen(["sleep", "60"], env={_MARK: mark}) for name, mark in marks.items()}
    try:
        assert end_orphans() >= 2
        for name in ("orphan", "reused"):
            assert processes[name].wait(5) == -signal.SIGKILL
        assert [processes[name].poll() for name in ("strange", "living")] == [None, None]
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


# ---- the real thing -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(folder: Path, *, database: str = "server.sqlite3") -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A real `autobatch serve`."""
    variables = {
        "PYTHONPATH": f"{_ROOT}:{_ROOT / 'server'}",
        "AUTOBATCH_SERVER_DATABASE_URL": f"sqlite:///{folder / database}",
        "AUTOBATCH_SERVER_LEASE": "3",
    }
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "autobatch", "serve", "--port", "0"],
            env={**os.environ, **variables},
            stderr=file,
            text=True,
        )
    try:
        until = time.monotonic() + 30
        while "serving on http://" not in (said := log.read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.05)
        url = said.split("serving on ")[1].split()[0]
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def test_a_service_from_start_to_end(tmp_path: Path, libraries: object) -> None:
    """A probe on the emulated card is followed to its plan; another is cancelled, a third survives SIGTERM; nothing stays."""
    del libraries  # compiled before, not under the clock
    question = {"workload": "gpt2", "gpu": "L4", "target": 4, "parameters": {"seq_len": 64}}
    with served(tmp_path) as (process, client):
        first = client.post("/v1/probes", json=question).json()["id"]
        second = client.post("/v1/probes", json=question | {"target": 8, "force": True}).json()["id"]
        third = client.post("/v1/probes", json=question | {"target": 16, "force": True}).json()["id"]
        with client.stream("GET", f"/v1/probes/{first}/events") as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        assert events[-1]["kind"] == "succeeded", events[-1]
        assert {"device", "trial_started", "trial_ended"} <= {event["kind"] for event in events}
        wait_for_state(client, second, "running")
        assert client.post(f"/v1/probes/{second}/cancel").status_code == 202
        asked = time.monotonic()
        wait_for_state(client, second, "cancelled")
        assert time.monotonic() - asked < 10
        wait_for_state(client, third, "running")
        with client.stream("GET", f"/v1/probes/{third}/events") as stream:
            process.send_signal(signal.SIGTERM)
            said = list(stream.iter_lines())
        assert said
        assert process.wait(20) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert not of_probes([first, second, third])
    with served(tmp_path) as (process, client):
        ended = client.get(f"/v1/probes/{third}", params={"wait": 60}).json()
        assert (ended["state"], ended["attempts"]) == ("succeeded", 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def wait_for_state(client: httpx.Client, probe_id: str, state: str) -> None:
    """Poll until a probe is in a state."""
    until = time.monotonic() + 40
    while (found := client.get(f"/v1/probes/{probe_id}").json()["state"]) != state:
        assert time.monotonic() < until, f"{probe_id} is {found}, not {state}"
        time.sleep(0.1)


def of_probes(probe_ids: list[str]) -> list[int]:
    """Processes that carry the mark of one of these probes."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                environment = (entry / "environ").read_bytes()
                if any(f"{_MARK}={probe_id}".encode() in environment for probe_id in probe_ids):
                    found.append(int(entry.name))
    return found
