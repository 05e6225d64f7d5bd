"""How a probe is run: in a process of its own, watched for its time and its memory, ended with all that it started."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from autobatch_server.queue import Claim

__all__ = ["ChildExecution", "ChildExecutor", "Execution", "Executor", "ProbeTask", "end_orphans"]

_LOG = logging.getLogger(__name__)
# By this variable everything that a probe started is known: whose it is, and which process of ours must live for it to live.
_MARK = "AUTOBATCH_SERVER_PROBE"
_GRACE_SECONDS = 5.0
_LONGEST_LINE = 8 * 1024**2
_LONGEST_LOG = 64 * 1024
_MEMORY_SECONDS = 0.5  # between looks at the host memory that a run uses
# What a training job sees of our environment; the operator may name more.
_PASSED_ON = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "SHELL", "VIRTUAL_ENV", "CONDA_PREFIX",
    "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",
    "CUDA_HOME", "CUDA_PATH", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CC", "OMP_NUM_THREADS",
)  # fmt: skip
_PASSED_ON_PREFIXES = ("LC_", "NVIDIA_", "NCCL_")


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """One run of one probe."""

    claim: Claim
    library_workload: str
    """What the library calls the workload."""
    options: Mapping[str, Any]
    """The JSON form of `ProbeOptions`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that this run alone needs."""


class Execution(Protocol):
    """A run under way; a context manager that ends it and all that it started."""

    def __enter__(self) -> Self:
        """Start it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it, whatever it is doing."""

    def next_message(self, seconds: float) -> Mapping[str, Any] | None:
        """The next message, `{"event"|"report"|"problem"|"died": …}`; None where none came in time."""


class Executor(Protocol):
    """Starts runs."""

    def start(self, task: ProbeTask) -> Execution:
        """Prepare a run, to be entered."""


@dataclass(frozen=True, kw_only=True)
class ChildExecutor:
    """Runs each probe in a child process."""

    memory_limit_bytes: int
    environment_names: tuple[str, ...] = ()

    def start(self, task: ProbeTask) -> ChildExecution:
        """Prepare a run."""
        return ChildExecution(task, self)

    def environment(self, task: ProbeTask) -> dict[str, str]:
        """What the child sees of our environment: nothing that could hold a secret of ours."""
        names = {*_PASSED_ON, *self.environment_names}
        passed = {
            name: value for name, value in os.environ.items() if name in names or name.startswith(_PASSED_ON_PREFIXES)
        }
        ours = psutil.Process()
        return {
            **passed,
            **task.environment,
            _MARK: f"{task.claim.record.id}.{task.claim.fence}:{ours.pid}:{ours.create_time():.2f}",
        }


class ChildExecution:
    """A run in a child process."""

    def __init__(self, task: ProbeTask, executor: ChildExecutor) -> None:
        """Prepare it."""
        self._task = task
        self._executor = executor
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""
        self._log = b""
        self._environment: dict[str, str] = {}
        self._watched = selectors.DefaultSelector()  # never select(2), which takes no descriptor above 1023
        self._looked = time.monotonic()

    def __enter__(self) -> Self:
        """Start the child, in a session of its own."""
        self._environment = self._executor.environment(self._task)
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self._environment, "PYTHONPATH": _import_path()},
            start_new_session=True,
        )
        order = json.dumps({"workload": self._task.library_workload, "options": dict(self._task.options)}).encode()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died at once: what it leaves says so
                self._process.stdin.write(order + b"\n")
                self._process.stdin.close()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                self._watched.register(stream, selectors.EVENT_READ)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the child and all that it started: first asked to, then made to."""
        process = self._process
        self._watched.close()
        if process is None:
            return
        started = _below(process.pid)  # as long as the child lives, all that lost its parent is the child's again
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for descendant in started:
            with contextlib.suppress(psutil.Error):
                descendant.kill()
        _end_marked(self._environment[_MARK])
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process = None

    @property
    def command(self) -> list[str]:
        """What is started."""
        return [sys.executable, "-P", "-m", "autobatch_server.child", str(os.getpid())]

    @property
    def pid(self) -> int | None:
        """The child's process id, while it runs."""
        return None if self._process is None else self._process.pid

    @property
    def log_text(self) -> str:
        """The end of what the child wrote to its standard error."""
        return self._log.decode(errors="replace")

    def next_message(self, seconds: float) -> Mapping[str, Any] | None:
        """The next message of the child; None where none came in time."""
        until = time.monotonic() + seconds
        if time.monotonic() - self._looked > _MEMORY_SECONDS:
            self._looked = time.monotonic()
            if (over := self._over_memory()) is not None:
                return over
        while b"\n" not in self._received:
            left = until - time.monotonic()
            if left <= 0:
                return None
            if not self._read(left):
                return self._death()
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _read(self, seconds: float) -> bool:
        """Take in what the child wrote; False where it wrote its last."""
        process = self._process
        if process is None or process.stdout is None:
            return False
        for key, _ in self._watched.select(min(seconds, _MEMORY_SECONDS)):
            piece = os.read(key.fd, 65536)
            if key.fileobj is process.stdout:
                self._received += piece
                if not piece or len(self._received) > _LONGEST_LINE:
                    return False
            elif piece:
                self._log = (self._log + piece)[-_LONGEST_LOG:]
            else:  # a closed stream is always ready: looked at again, it would keep a core busy
                self._watched.unregister(key.fileobj)
        return True

    def _death(self) -> Mapping[str, Any]:
        process = self._process
        status = None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(_GRACE_SECONDS)
        return {"died": {"status": status, "log": self.log_text}}

    def _over_memory(self) -> Mapping[str, Any] | None:
        used = _memory_of(self.pid)
        if used <= self._executor.memory_limit_bytes:
            return None
        return {"over_memory": {"used_bytes": used, "limit_bytes": self._executor.memory_limit_bytes}}


def _memory_of(pid: int | None) -> int:
    """Host memory in bytes that a process and all below it hold for themselves: mapped files and shared memory do not count."""
    if pid is None:
        return 0
    used = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (psutil.Process(pid), *_below(pid)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                memory = process.memory_info()
                used += memory.rss - getattr(memory, "shared", 0)
    return used


def _below(pid: int) -> list[psutil.Process]:
    """Every process that descends from one; none where it is gone."""
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def _import_path() -> str:
    """Where this very copy of the two packages is imported from, before what the operator set."""
    roots = {str(Path(__file__).parents[1]), str(Path(sys.modules["autobatch"].__file__ or ".").parents[1])}
    return os.pathsep.join([*sorted(roots), *filter(None, [os.environ.get("PYTHONPATH")])])


def _end_marked(mark: str) -> None:
    """End every process that carries the mark in its environment, until a look round finds none."""
    for _ in range(20):
        found = [pid for pid, carried in _marked() if carried == mark]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def end_orphans() -> int:
    """End what probes of killed runners left behind, until a look round finds nothing; returns how many processes."""
    ended: set[int] = set()
    for _ in range(20):
        orphans = [pid for pid, mark in _marked() if pid != os.getpid() and not _owner_lives(mark)]
        if not orphans:
            break
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                ended.add(pid)
        time.sleep(0.01)
    return len(ended)


def _owner_lives(mark: str) -> bool:
    """Whether the runner that a mark names is there; a mark of another form is none of ours, and left alone."""
    try:
        _, owner, started = mark.rsplit(":", 2)
        return f"{psutil.Process(int(owner)).create_time():.2f}" == started
    except ValueError:
        return True
    except psutil.NoSuchProcess:
        return False


def _marked() -> list[tuple[int, str]]:
    """Each process that carries a mark, with the mark; a dead one that waits to be reaped has no environment any more."""
    prefix = f"{_MARK}=".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        marks = [variable[len(prefix) :] for variable in variables if variable.startswith(prefix)]
        if marks:
            found.append((int(entry.name), marks[0].decode(errors="replace")))
    return found
