"""`autobatch emulate`: a command runs as it would by itself, on emulated cards, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from autobatch.emulator.launch import run_command
from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch.emulator.build import Libraries

ROOT = Path(__file__).parents[2]
SHARED = Path("/dev/shm")  # noqa: S108 - where the machines live
DRIVER = Path(__file__).parent / "scripts" / "driver.py"


STARTED: list[int] = []


def machines_of(pid: int) -> list[Path]:
    """The machines that the process with this id has made, and that are there still."""
    return list(SHARED.glob(f"autobatch-gpu-{pid}-*"))


@pytest.fixture(autouse=True)
def nothing_left(libraries: Libraries) -> Iterator[None]:
    """No machine of what a test started is left when it ends."""
    STARTED.clear()
    yield
    assert [path for pid in STARTED for path in machines_of(pid)] == []


def start(*command: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "autobatch", "emulate", "T4", "--", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "server")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process.pid)
    return process


def run(*command: str) -> tuple[int, str, str]:
    process = start(*command)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def wait_for_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_exit_status() -> None:
    """The command's status is ours."""
    assert run("bash", "-c", "echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")


def test_status_of_a_signal() -> None:
    """128 + N for a command that signal N ended."""
    assert run("bash", "-c", "kill -9 $$")[0] == 128 + 9


def test_no_such_command() -> None:
    """A command that is not there ends with 127, as in a shell, and one line names it."""
    assert run("no-such-command-here") == (
        127,
        "",
        "autobatch: cannot run no-such-command-here: No such file or directory\n",
    )


def test_command_that_cannot_be_run(tmp_path: Path) -> None:
    """A file that is no program ends with 126, as in a shell."""
    (tmp_path / "data").touch()
    assert run(str(tmp_path / "data")) == (126, "", f"autobatch: cannot run {tmp_path / 'data'}: Permission denied\n")


def test_own_options_still_end_with_2() -> None:
    """What is wrong on our own side of the command line is a usage error."""
    status, output, errors = run()
    assert (status, output) == (2, "")
    assert "no command: write autobatch emulate GPU -- COMMAND" in errors


def test_argument_with_a_nul() -> None:
    """No program can be given a NUL."""
    with pytest.raises(UsageError, match="cannot run 'true'"):
        run_command(["true", "a\0b"], os.environ)


def test_mask_and_handlers_are_put_back() -> None:
    """Running a command leaves this process's signals as they were."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGCHLD)
    assert run_command(["true"], os.environ) == 0
    assert (signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGCHLD)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on(number: signal.Signals) -> None:
    """A signal sent to us reaches the command, and its own answer is ours."""
    script = f"trap 'echo got; exit 5' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    process = start("bash", "-c", script)
    assert wait_for_line(process) == "ready"
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (5, "got\n")


def test_untrapped_signal() -> None:
    """A command that SIGTERM ends, ends us with 143."""
    process = start("bash", "-c", "echo ready; exec sleep 60")
    assert wait_for_line(process) == "ready"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_ignored_signal_stays_ignored() -> None:
    """Under nohup, SIGHUP is ignored by us and by the command."""
    process = start("bash", "-c", "echo ready; sleep 0.4; echo done", prefix=("nohup",))
    assert wait_for_line(process) == "ready"
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "done\n")


def test_killed_parent_leaves_an_orphan_for_the_next() -> None:
    """Kill -9 leaves the file; the next start removes it."""
    process = start("bash", "-c", "echo ready; sleep 1")
    assert wait_for_line(process) == "ready"
    process.kill()
    process.wait()
    assert len(machines_of(process.pid)) == 1
    assert run("true")[0] == 0
    assert machines_of(process.pid) == []
    process.communicate()


def test_ordinary_programs(tmp_path: Path) -> None:
    """A compiler, a shell and version control say and do what they always do."""
    (tmp_path / "a.c").write_text('#include <stdio.h>\nint main(void) { puts("built"); return 0; }\n')
    script = f"cd {tmp_path} && cc -o a a.c && ./a && git init -q . && git status --short | sort && ls | wc -l"
    assert run("bash", "-c", script) == (0, "built\n?? a\n?? a.c\n2\n", "")


def test_card_is_seen_below_a_shell() -> None:
    """The emulated card is there for what a shell starts."""
    status, output, errors = run("bash", "-c", f"{sys.executable} {DRIVER} devices")
    assert (status, errors) == (0, "")
    assert output.startswith('["GPU-')


def test_missing_call_is_said_once_by_each_program() -> None:
    """A call that is not there is named on standard error: once by a program, however often it makes it."""
    program = f"{sys.executable} -c 'import ctypes; print([ctypes.CDLL(None).cudaDeviceReset() for _ in range(3)])'"
    line = "autobatch: the emulated GPU does not implement cudaDeviceReset\n"
    assert run("bash", "-c", f"{program}; {program}") == (0, 2 * "[801, 801, 801]\n", 2 * line)
