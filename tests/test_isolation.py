"""The child process of a probe: whatever a job does to it, the parent names the cause and leaves nothing behind.

A job's module is imported before torch is, so that what it does there costs no time: most of these jobs misbehave
while they are imported.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from autobatch.errors import BusyError, UsageError, WorkloadError
from autobatch.isolation import IsolatedTrials
from autobatch.lastwords import last_line, last_place, read_tail, was_importing
from autobatch.options import ProbeOptions

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., None]:
    """Start the child on a job whose module has this source."""

    def start_source(source: str, *, deadline: float = 60.0) -> None:
        (tmp_path / "job.py").write_text(f"import os, sys, time\n{textwrap.dedent(source)}\n")
        options = ProbeOptions(target=8, deadline=deadline)
        environment = {**os.environ, "PIDS": str(tmp_path / "pids")}
        with IsolatedTrials(f"{tmp_path / 'job.py'}:job", options, environment=environment):
            pass

    return start_source


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or is a zombie that its new parent has yet to wait for."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ValueError('my own [mistake]')", r"failed: ValueError: my own \[mistake\]"),
        ("os._exit(3)", "ended by itself with status 3 at start-up$"),
        ("os._exit(0)", "ended by itself with status 0 at start-up$"),
        ("print('so long'); sys.stdout.flush(); os._exit(3)", "status 3 at start-up; its last words: so long$"),
        ("import ctypes\nctypes.string_at(0)", r"killed by SIGSEGV at start-up in .*job\.py, line 3 in <module>$"),
        ("os.kill(os.getpid(), 9)", r"killed by SIGKILL \(often the host's own out-of-memory killer\) at start-up$"),
        ("os.abort()", r"killed by SIGABRT at start-up in .*job\.py, line 2"),
        ("sys.exit(5)", r"ended the program \(5\)"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt$"),
        ("class Odd(BaseException): pass\nraise Odd('one\\ntwo')", "raised Odd: one$"),
        (
            "os.closerange(3, 256)",
            "status 4 at start-up; its last words: the training job closed the pipe to autobatch",
        ),
        ("os.closerange(3, 256)\ntime.sleep(60)", r"closed the pipe .* in .*job\.py, line 3 in <module>: a job must"),
        ("if os.fork() == 0: time.sleep(60)\nos._exit(9)", "ended by itself with status 9"),
    ],
    ids=lambda value: value.splitlines()[-1][:40],
)
def test_a_child_that_dies_is_named_with_its_cause(start: Callable[..., None], source: str, message: str) -> None:
    """Whatever ends the child, the error says what, at what moment, and where in the job; in one line, and soon."""
    began = time.monotonic()
    with pytest.raises(WorkloadError, match=message) as caught:
        start(source)
    assert "\n" not in str(caught.value)
    assert "Extension modules" not in str(caught.value)
    assert time.monotonic() - began < 20


def test_the_jobs_own_traceback_is_kept(start: Callable[..., None]) -> None:
    """`--verbose` shows where the job failed."""
    with pytest.raises(WorkloadError) as caught:
        start("def inner():\n    raise ValueError('x')\ninner()")
    assert "in inner" in caught.value.traceback_text


def test_a_module_that_reads_its_arguments_finds_none(start: Callable[..., None]) -> None:
    """The child's own arguments are not the job's."""
    with pytest.raises(UsageError, match="has no function 'job'"):
        start("assert len(sys.argv) == 1, sys.argv\nassert sys.argv[0].endswith('job.py')")


def test_a_job_that_prints_without_end_costs_no_memory(start: Callable[..., None]) -> None:
    """Megabytes on both streams block nobody, and only the end of them is read."""
    with pytest.raises(WorkloadError, match="status 3") as caught:
        start(
            """
            for stream in (sys.stdout, sys.stderr):
                stream.write(("z" * 999 + chr(10)) * 4000)
                stream.flush()
            os._exit(3)
            """
        )
    assert len(str(caught.value)) < 500
    assert len(caught.value.traceback_text) < 1 << 18


def test_a_hang_ends_at_the_deadline(start: Callable[..., None]) -> None:
    """The whole probe's deadline also holds while the child starts."""
    began = time.monotonic()
    with pytest.raises(BusyError, match="deadline of 1 s passed at start-up"):
        start("time.sleep(60)", deadline=1.0)
    assert time.monotonic() - began < 5


def test_nothing_that_a_job_started_lives_on(start: Callable[..., None], tmp_path: Path) -> None:
    """Children, and children that left the process group and lost their parent, end with the probe."""
    with pytest.raises(WorkloadError, match="status 7"):
        start(
            """
            import subprocess
            def keep(pid):
                with open(os.environ["PIDS"], "a") as file:
                    print(pid, file=file)
            keep(os.getpid())
            keep(subprocess.Popen(["sleep", "60"]).pid)
            keep(subprocess.Popen(["sleep", "60"], start_new_session=True).pid)
            if (pid := os.fork()) == 0:
                time.sleep(60)
            keep(pid)
            os._exit(7)
            """
        )
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4
    assert all(has_ended(pid) for pid in pids)


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed outright cannot clean up: the kernel ends the child for it."""
    (tmp_path / "job.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    script = (
        "import os, sys\nfrom autobatch.isolation import IsolatedTrials\nfrom autobatch.options import ProbeOptions\n"
        "with IsolatedTrials(sys.argv[1], ProbeOptions(target=8), environment=os.environ): pass\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, f"{tmp_path / 'job.py'}:job"], cwd=ROOT) as parent:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert parent.poll() is None
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
    assert has_ended(int((tmp_path / "pid").read_text()))


# ---- what is read off a log ------------------------------------------------------------------------------------------

DUMP = """\
loading data
half-way there
Fatal Python error: Segmentation fault

Thread 0x00007f0000000001 (most recent call first):
  File "/home/me/loader.py", line 3 in wait

Current thread 0x00007f0000000002 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1 in _call_impl
  File "/home/me/train.py", line 7 in step
  File "/home/me/train.py", line 90 in main

Extension modules: numpy, torch._C (total: 2)
"""


def test_the_place_of_a_crash_is_the_jobs_own_innermost_frame() -> None:
    """Neither torch's frames nor those of another thread say where the job stood."""
    assert last_place(DUMP) == "/home/me/train.py, line 7 in step"


IMPORTING = f"""\
Fatal Python error: Aborted

Current thread 0x00007f0000000002 (most recent call first):
  File "{Path(os.__file__).parent / "inspect.py"}", line 1065 in getsourcefile
  File "/venv/lib/python3.11/site-packages/sympy/core/core.py", line 9 in <module>
  File "/venv/lib/python3.11/site-packages/torch/_dynamo/__init__.py", line 7 in <module>
  File "/venv/lib/python3.11/site-packages/torch/optim/optimizer.py", line 7 in step
"""


def test_a_crash_outside_the_job_is_not_placed_in_other_peoples_code() -> None:
    """A line of Python's own `inspect.py` says nothing to a user; that torch was still being imported does."""
    assert last_place(IMPORTING) == ""
    assert was_importing(IMPORTING) == "torch"
    assert was_importing(DUMP) == ""
    in_a_job = IMPORTING + '  File "/home/me/train.py", line 1 in <module>\n'
    assert last_place(in_a_job) == "/home/me/train.py, line 1 in <module>"


def test_last_words_are_the_jobs_and_not_the_dumps() -> None:
    """The list of extension modules, with which a dump ends, is nobody's last word."""
    assert last_line(DUMP) == "half-way there"
    assert last_line("") == last_place("") == last_place("no dump at all") == ""
    assert len(last_line("x" * 10_000)) < 250


def test_the_tail_of_a_log_leaves_its_position_alone(tmp_path: Path) -> None:
    """The child writes at the same position: a reader that moved it would tear the log."""
    with (tmp_path / "log").open("w+b", buffering=0) as log:
        log.write(b"".join(b"%d\n" % number for number in range(200_000)))
        end = log.tell()
        assert read_tail(log.fileno(), 2) == "199998\n199999"
        assert log.tell() == end
