"""Whatever ends a probe of a command, and whenever, nothing of the command is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

import pytest
from processes import MARK, marked, wait_until_gone

import autobatch

pytestmark = pytest.mark.usefixtures("libraries")

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "examples" / "commands"
TWO_RANKS = SCRIPTS / "two_ranks.py"


def start(mark: str, **variables: str) -> subprocess.Popen[bytes]:
    """A probe of two ranks under torchrun, whose workers have sessions of their own."""
    command = [
        *(sys.executable, "-m", "autobatch", "probe", "--target", "4096", "--world-size", "2", "--emulate", "T4", "--"),
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(TWO_RANKS)),
        *("--batch-size", "{micro_batch_size}", "--accumulate", "{accumulation_steps}"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: mark, **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal; before the program has come to that, Python's default ends it."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_signal_at_random_moments(number: signal.Signals) -> None:
    """Ten moments in all: the probe ends with its status within seconds, and every process and file of it is gone."""
    draw = random.Random(int(number))
    for moment in range(4 if number == signal.SIGINT else 3):
        mark = f"{os.getpid()}-{number}-{moment}"
        probe = start(mark)
        deadline = time.monotonic() + 30
        while not handles(probe.pid, signal.SIGTERM) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 6.0))
        probe.send_signal(number)
        assert probe.wait(20) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}[number]
        assert marked(mark) == []


def test_a_killed_probe_takes_its_command_along(tmp_path: Path) -> None:
    """SIGKILL leaves the probe no say: what stands between it and the command hears of its death, and ends everything."""
    mark = f"{os.getpid()}-kill"
    probe = start(mark, TMPDIR=str(tmp_path))
    deadline = time.monotonic() + 30
    while len(marked(mark)) < 5 and time.monotonic() < deadline:  # probe, warden, torchrun, two workers
        time.sleep(0.05)
    assert len(marked(mark)) >= 5
    probe.kill()
    probe.wait()
    assert wait_until_gone(mark, 10) == []
    assert list(tmp_path.glob("autobatch-*")) == []  # torchrun's own folder stays, as whenever it is killed


def test_shared_memory_of_the_command_goes_with_it(tmp_path: Path) -> None:
    """Python's own tracker removes what its processes left, if it is let live until they are gone."""
    script = tmp_path / "shares.py"
    shared = (
        "from multiprocessing import shared_memory\n"
        "kept = shared_memory.SharedMemory(create=True, size=4096)\n"
        f"open({str(tmp_path / 'name')!r}, 'w').write(kept.name)\n"
    )
    loop = (SCRIPTS / "plain_loop.py").read_text()
    script.write_text(loop.replace("import argparse\n", "import argparse\n" + shared, 1))
    command = [sys.executable, str(script), "--batch-size", "{micro_batch_size}", "--width", "64"]
    autobatch.probe_command(command, target=1, emulate="T4")
    name = (tmp_path / "name").read_text()
    assert name
    with pytest.raises(FileNotFoundError):
        shared_memory.SharedMemory(name=name)
