"""Run a probe's trials in a child process, so that whatever a trial does, the probe survives it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from autobatch.breakdown import MemoryBreakdown
from autobatch.emulation import describe_emulation
from autobatch.errors import AutobatchError, BusyError, WorkloadError
from autobatch.facts import AnswerRemarks, DeviceFacts
from autobatch.jsonform import from_json_form, to_json_form
from autobatch.lastwords import last_line, last_place, read_tail, rebuilt_error, was_importing
from autobatch.trial import Trial
from autobatch.workload.inspection import Inspection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from autobatch.emulator.machine import EmulatedMachine
    from autobatch.options import ProbeOptions

__all__ = ["IsolatedTrials"]

# Importing torch and the job's module: minutes on a cold disk.
_START_SECONDS = 600.0
_LAST_WORDS_SECONDS = 2.0
# A process that the job forked holds the pipe open when the child is long dead: it is looked at meanwhile.
_GLANCE_SECONDS = 0.25
# The child runs this very copy of the package, wherever it was imported from, and nothing of the current folder.
_PACKAGE_ROOT = str(Path(__file__).parents[1])
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from autobatch.worker import main; sys.exit(main())"
# By this variable everything that a job started is known, also what left its process group and lost its parent.
_MARK = "AUTOBATCH_TRIALS"
_TAIL_LINES = 40


class IsolatedTrials:
    """A child process that runs trials of one workload, and everything that it started.

    A context manager: on the way out, also by an exception or a signal, the child and all that it started are ended.
    A child that dies is named with its cause; it is not started again, since whatever killed it would again.
    """

    def __init__(
        self,
        workload: str,
        options: ProbeOptions,
        *,
        environment: Mapping[str, str],
        machine: EmulatedMachine | None = None,
        show_output: bool = False,
    ) -> None:
        """Prepare the child.

        Args:
            workload: the training job's name, as `WorkloadName.parse` takes it.
            options: what the probe is asked.
            environment: the child's environment variables.
            machine: the emulated machine that it runs on, where it does.
            show_output: whether what the job prints goes to standard error, rather than to a log that is shown
                where the job fails.
        """
        self._workload = workload
        self._options = options
        self._mark = secrets.token_hex(8)
        self._environment = {**environment, _MARK: self._mark}
        self._machine = machine
        self._show_output = show_output
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()
        self._facts: DeviceFacts | None = None
        self._inspection: Inspection | None = None
        self._received = b""
        self._deadline = None if options.deadline is None else time.monotonic() + options.deadline

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

    @property
    def facts(self) -> DeviceFacts:
        """The device that the trials run on."""
        if self._facts is None:
            raise RuntimeError("the child process was not started: use IsolatedTrials as a context manager")
        return self._facts

    @property
    def is_alive(self) -> bool:
        """Whether the child can be asked anything more."""
        return self._process is not None and self._process.poll() is None

    def end_child(self) -> None:
        """End the child from another thread: what waits for it raises `WorkloadError`."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def move_to(self, options: ProbeOptions) -> None:
        """Go on, in the same child, with another question on another device; what was looked at of the job stays known.

        Raises:
            AutobatchError: the device cannot be opened; the child is of no more use then.
        """
        self._options = options
        self._deadline = None if options.deadline is None else time.monotonic() + options.deadline
        self._send(open=to_json_form(options))
        self._facts = from_json_form(
            DeviceFacts, self._receive("the next device", _START_SECONDS)["ready"], where="ready"
        )

    def run_trial(self, window: Sequence[int], *, confirmation: bool) -> Trial:
        """Run one trial in the child.

        Raises:
            WorkloadError: the job failed other than for memory, the child died, or the trial took too long.
            BusyError: the whole probe's deadline passed meanwhile.
        """
        if self.facts.basis == "emulated" and self._inspection is None:
            self._inspect(min(window))
        self._send(window=list(window), confirmation=confirmation)
        answer = self._receive(f"micro-batch {max(window)}", self._options.trial_timeout)
        return from_json_form(Trial, answer["trial"], where="trial")

    def itemize(self, window: Sequence[int]) -> MemoryBreakdown | None:
        """Run one trial more in the child and take its memory apart; raises as `run_trial` does.

        Returns:
            What the memory is made of; None where the trial did not fit this time.
        """
        self._send(itemize=list(window))
        answer = self._receive(f"micro-batch {max(window)}", self._options.trial_timeout)["breakdown"]
        return None if answer is None else from_json_form(MemoryBreakdown, answer, where="breakdown")

    def remarks(self) -> AnswerRemarks:
        """What is to be said of an emulated answer; nothing of a measured one."""
        if self._inspection is None:
            return AnswerRemarks()
        unsupported = self._machine.unsupported_calls() if self._machine else ()
        return describe_emulation(self._inspection, unsupported)

    def files(self) -> Sequence[str]:
        """The user's own files that the job imported; none where the child cannot say any more."""
        self._send(files=True)
        try:
            return list(self._receive("the end", _LAST_WORDS_SECONDS)["files"])
        except AutobatchError:
            return []

    def _inspect(self, size: int) -> None:
        self._send(inspect=size)
        answer = self._receive(f"micro-batch {size}", self._options.trial_timeout)
        self._inspection = from_json_form(Inspection, answer["inspection"], where="inspection")

    # ---- the child ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        to_child, self._requests = os.pipe()
        self._answers, from_child = os.pipe()
        self._stack.callback(os.close, self._requests)
        self._stack.callback(os.close, self._answers)
        self._log = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        output = sys.stderr if self._show_output else self._log
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, _PACKAGE_ROOT, str(to_child), str(from_child), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                pass_fds=(to_child, from_child),
                start_new_session=True,  # so that Ctrl-C reaches the parent alone, which then ends the whole group
            )
        finally:
            os.close(to_child)
            os.close(from_child)
        self._send(workload=self._workload, options=to_json_form(self._options))
        self._facts = from_json_form(DeviceFacts, self._receive("start-up", _START_SECONDS)["ready"], where="ready")

    def _stop(self) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _end_marked(self._mark)
            self._process = None
        self._stack.close()

    # ---- messages -------------------------------------------------------------------------------------------------

    def _send(self, **content: object) -> None:
        # A child that has died is reported by what it leaves to be read.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._requests, json.dumps(content).encode() + b"\n")

    def _receive(self, what: str, seconds: float | None) -> dict[str, Any]:
        line = self._read_line(what, seconds)
        if line is None:
            raise self._explain_death(what)
        answer = json.loads(line)
        if "error" in answer:
            raise self._rebuild(answer["error"])
        return dict(answer)

    def _read_line(self, what: str, seconds: float | None) -> bytes | None:
        """One line of the child; None where it has died or closed its end."""
        ends = [
            end for end in (None if seconds is None else time.monotonic() + seconds, self._deadline) if end is not None
        ]
        while b"\n" not in self._received:
            left = max(0.0, min(ends) - time.monotonic()) if ends else _GLANCE_SECONDS
            died = self._process is None or self._process.poll() is not None
            ready, _, _ = select.select([self._answers], [], [], 0 if died else min(left, _GLANCE_SECONDS))
            if ready:
                piece = os.read(self._answers, 65536)
                if not piece:
                    return None
                self._received += piece
            elif died:
                return None
            elif left == 0:
                raise self._explain_timeout(what, seconds)
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _rebuild(self, described: Mapping[str, str]) -> AutobatchError:
        calls = self._machine.unsupported_calls() if self._machine else ()
        note = f" (the emulated GPU does not implement {', '.join(calls)})" if calls else ""
        return rebuilt_error(described, note=note)

    # ---- what went wrong ------------------------------------------------------------------------------------------

    def _explain_death(self, what: str) -> WorkloadError:
        code = self._exit_status()
        if code is None:
            stack = self._stack_of_child()
            return WorkloadError(
                f"the training job closed the pipe to autobatch at {what}{stack}: a job must leave alone the file "
                "descriptors that it did not open",
                traceback_text=self._tail(_TAIL_LINES),
            )
        if code < 0:
            hint = " (often the host's own out-of-memory killer)" if -code == signal.SIGKILL else ""
            how = f"was killed by {_signal_name(-code)}{hint}"
        else:
            how = f"ended by itself with status {code}"
        log = self._tail(400)
        said = last_line(log)
        text = f"the training job {how} at {what}{_placed(log)}"
        text += f"; its last words: {said}" if said else ""
        return WorkloadError(text, traceback_text=self._tail(_TAIL_LINES))

    def _exit_status(self) -> int | None:
        """How the child ended; None where it lives on with its end of the pipe closed."""
        if self._process is None:
            return 0
        try:
            return self._process.wait(_LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def _explain_timeout(self, what: str, seconds: float | None) -> AutobatchError:
        whole = self._deadline is not None and time.monotonic() >= self._deadline
        if whole:
            return BusyError(f"the deadline of {self._options.deadline:g} s passed at {what}: give --deadline more")
        stack = self._stack_of_child()
        way_out = (
            "importing torch and the training job's module should take less"
            if self._facts is None
            else "give --trial-timeout more if it only is slow"
        )
        return WorkloadError(
            f"{what} took more than {seconds:g} s and was ended{stack}: {way_out}",
            traceback_text=self._tail(_TAIL_LINES),
        )

    def _stack_of_child(self) -> str:
        """End the child so that it writes its stack, and read off where it was."""
        if self._process is None:
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS_SECONDS)
        return _placed(self._tail(400))

    def _tail(self, lines: int) -> str:
        return "" if self._show_output else read_tail(self._log.fileno(), lines)


def _placed(log: str) -> str:
    """Where it happened, to be set behind what happened: in the job's own code, where the log shows any of it."""
    if place := last_place(log):
        return f" in {place}"
    return f" while {package} was starting" if (package := was_importing(log)) else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has a number only
        return f"signal {number}"


def _end_marked(mark: str) -> None:
    """End every process of ours that carries the mark in its environment, until a look round finds none."""
    wanted = f"{_MARK}={mark}".encode()
    for _ in range(5):
        found = [
            int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and _carries(entry, wanted)
        ]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _carries(entry: Path, wanted: bytes) -> bool:
    try:
        return wanted in (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile, or another user's
        return False
