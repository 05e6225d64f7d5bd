"""One run of a training command: its processes, its messages and its output."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from autobatch.lastwords import last_line, last_place, read_tail

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

__all__ = ["CommandRun", "Ended", "Message", "TimedOut", "hooked_environment", "temporary_folder"]

_WARDEN = str(Path(__file__).with_name("warden.py"))
_HOOK_FOLDER = str(Path(__file__).with_name("hook"))
"""What stands on PYTHONPATH so that Python runs the hook."""
_PACKAGE_ROOT = str(Path(__file__).parents[2])
_LAST_WORDS_SECONDS = 2.0
_TAIL_LINES = 40
_LARGEST_MESSAGE = 1 << 20


# A socket's path has at most 108 characters (unix(7)).
_LONGEST_FOLDER = 70


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for one run, whose path leaves room for a socket's."""
    parent = "/tmp" if len(tempfile.gettempdir()) > _LONGEST_FOLDER else None  # noqa: S108 - one of its own is made there
    return tempfile.TemporaryDirectory(prefix="autobatch-", dir=parent, ignore_cleanup_errors=True)


@dataclass(frozen=True, kw_only=True)
class Message:
    """What the hook in one process of the command says."""

    kind: str
    pid: int
    rank: int
    content: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The command has ended by itself."""

    status: int
    """Its exit status, negative for a signal."""
    problem: str = ""
    """Why it could not be started; empty where it was."""


@dataclass(frozen=True, kw_only=True)
class TimedOut:
    """The time was over."""


def hooked_environment(environment: Mapping[str, str], setup: Mapping[str, object], channel: Path) -> dict[str, str]:
    """The variables with which a command loads the hook, beside those given.

    Args:
        environment: the command's own variables.
        setup: what the hook is told.
        channel: the socket to which it answers.
    """
    paths = [_HOOK_FOLDER, *filter(None, [environment.get("PYTHONPATH")])]
    hook = json.dumps({**setup, "channel": str(channel)})
    return {**environment, "AUTOBATCH_HOOK": hook, "PYTHONPATH": os.pathsep.join(paths)}


class CommandRun:
    """A command under way, and everything that it starts.

    A context manager: on the way out all of it is ended. The hook's messages come over a socket in a folder of its own, not
    over a descriptor, since launchers such as torchrun close what they did not open. (Source: `subprocess.Popen`'s
    documentation, `close_fds`.)
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        setup: Mapping[str, object],
        folder: Path,
        show_output: bool,
    ) -> None:
        """Prepare a run.

        Args:
            arguments: the command.
            environment: its environment variables; the hook's are added.
            setup: what the hook is told, beside where to answer.
            folder: a folder for the socket, with all that is to be removed at the end of the run.
            show_output: whether the command's output goes to standard error rather than to a log.
        """
        self._arguments = list(arguments)
        self._folder = folder
        channel = folder / "channel"
        self._environment = {
            **hooked_environment(environment, {**setup, "package_root": _PACKAGE_ROOT}, channel),
            "PYTHONFAULTHANDLER": "1",  # a process that is ended by SIGABRT says where it was
        }
        self._channel_path = channel
        self._show_output = show_output
        self._stack = contextlib.ExitStack()
        self._warden: subprocess.Popen[bytes] | None = None
        self._ended: Ended | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        self._channel = self._stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        )
        self._channel.bind(str(self._channel_path))
        self._stack.callback(self._channel_path.unlink, missing_ok=True)
        self._status, status_end = os.pipe()
        self._stack.callback(os.close, self._status)
        self._log = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        output = sys.stderr if self._show_output else self._log
        try:
            self._warden = subprocess.Popen(
                [sys.executable, "-I", _WARDEN, str(os.getpid()), str(status_end), str(self._folder), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                pass_fds=(status_end,),
                start_new_session=True,  # so that Ctrl-C reaches this process alone, which then ends the command
            )
        finally:
            os.close(status_end)

    def _stop(self) -> None:
        warden, self._warden = self._warden, None
        if warden is not None:
            warden.terminate()  # it ends all below it first
            warden.wait()
        self._stack.close()

    def next_event(self, deadline: float | None) -> Message | Ended | TimedOut:
        """Wait for what comes next.

        Messages that were sent before the command ended come before its end.

        Args:
            deadline: when to stop waiting, by `time.monotonic`; None waits for ever.
        """
        while True:
            if message := self._read_message():
                return message
            if self._ended is not None:
                return self._ended
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return TimedOut()
            channel = self._channel.fileno()
            ready, _, _ = select.select([channel, self._status], [], [], left)
            if self._status in ready and channel not in ready:
                self._ended = self._read_status()

    def _read_message(self) -> Message | None:
        try:
            content = json.loads(self._channel.recv(_LARGEST_MESSAGE))
        except BlockingIOError:
            return None
        return Message(kind=content.pop("kind"), pid=content.pop("pid"), rank=content.pop("rank"), content=content)

    def _read_status(self) -> Ended:
        text = os.read(self._status, 4096).decode()
        if text.startswith("!"):
            return Ended(status=127, problem=text[1:])
        # Nothing written: the warden itself was killed.
        return Ended(status=int(text) if text else -signal.SIGKILL)

    # ---- what it said -----------------------------------------------------------------------------------------------

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines of what the command printed; empty where they were shown."""
        return "" if self._show_output else read_tail(self._log.fileno(), lines)

    def last_words(self) -> str:
        """The last line that the command printed."""
        return last_line(self.tail(400))

    def where_it_is(self, pids: Sequence[int]) -> str:
        """End processes of the command so that they write their stacks, and read off where they were."""
        waited = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                process.send_signal(signal.SIGABRT)
                waited.append(process)
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline and any(map(_is_running, waited)):
            time.sleep(0.02)
        return last_place(self.tail(400))


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
