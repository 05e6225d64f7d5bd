"""Fixtures for every test: the emulated GPU, compiled once, and scripts run on it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autobatch.emulator.build import Libraries, build_libraries
from autobatch.emulator.machine import EmulatedMachine
from autobatch.emulator.torchbuild import find_torch
from autobatch.gpu.catalogue import find_card

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Started in the background of a script (`nohup make test &`), the run is told to ignore these, and would hand that on to the
# programs whose ending by a signal is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Runs a script as `python script.py` does, and ends with its last line. The interpreter's own way out can abort where backward
# ran on a card shortly before: torch's thread then lets go of a Python object too late (seen with torch 2.15, one run in some).
TO_ITS_LAST_LINE = """
import os, runpy, sys
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush(), sys.stderr.flush(), os._exit(0)
"""

with contextlib.suppress(ModuleNotFoundError):  # tests on a card run where little is installed
    import hypothesis

    # Seconds say nothing of a test: the first draw alone builds tables, beside whatever else runs on the machine.
    hypothesis.settings.register_profile(
        "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("tests")

_ROOT = Path(__file__).resolve().parent.parent


# What no test sets otherwise is remembered nowhere near the user's own cache.
os.environ["AUTOBATCH_CACHE"] = "/proc/autobatch-tests-keep-nothing/measurements.sqlite3"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test remembers what it probes by itself."""
    folder = tmp_path_factory.getbasetemp() / "caches"
    monkeypatch.setenv("AUTOBATCH_CACHE", str(folder / secrets.token_hex(8) / "measurements.sqlite3"))


@dataclass(frozen=True, kw_only=True)
class ScriptRun:
    """What a script on an emulated machine answered."""

    answer: Any
    """The JSON that it printed."""
    unsupported_calls: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ScriptRunner:
    """Runs Python scripts on emulated machines."""

    libraries: Libraries

    def open(self, *cards: str, tenant_bytes: int = 0) -> EmulatedMachine:
        """Make a machine with these cards."""
        return EmulatedMachine([find_card(name) for name in cards], self.libraries, tenant_bytes=tenant_bytes)

    def start(
        self,
        machine: EmulatedMachine,
        script: Path,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
        python: str = sys.executable,
        options: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """Start a script on a machine, its output piped."""
        return subprocess.Popen(
            [python, *options, str(script), *arguments],
            env={**script_environment(machine), **(variables or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        script: Path,
        cards: Sequence[str],
        *arguments: str,
        tenant_bytes: int = 0,
        variables: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> ScriptRun:
        """Run a script to its end on a machine of its own, and read the JSON that it prints last."""
        with self.open(*cards, tenant_bytes=tenant_bytes) as machine:
            process = self.start(
                machine, script, *arguments, variables=variables, python=python, options=("-c", TO_ITS_LAST_LINE)
            )
            output, errors = process.communicate(timeout=240)
            assert process.returncode == 0, f"{script.name} ended with {process.returncode}\n{errors[-4000:]}"
            return ScriptRun(answer=json.loads(output.splitlines()[-1]), unsupported_calls=machine.unsupported_calls())


def script_environment(machine: EmulatedMachine) -> dict[str, str]:
    """The environment of a script on this machine: the checkout is imported, and the shell's own choices are not."""
    variables = machine.environment()
    variables.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    variables.pop("PYTORCH_ALLOC_CONF", None)
    variables["PYTHONPATH"] = os.pathsep.join(str(path) for path in (_ROOT, _ROOT / "server"))
    return variables


def run_two_ranks(
    machine: EmulatedMachine, script: Path, *words: str, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """A script under torchrun on two cards of a machine, which has to end well."""
    run = subprocess.run(
        [python, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), *words],
        env={**script_environment(machine), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return run


@pytest.fixture(scope="session")
def libraries() -> Libraries:
    """The compiled emulation for the installed torch."""
    build = find_torch()
    if build is None or build.cuda is None:
        pytest.skip("the installed torch is not a CUDA build")
    return build_libraries()


@pytest.fixture(scope="session")
def scripts(libraries: Libraries) -> ScriptRunner:
    """Runs scripts on emulated machines."""
    return ScriptRunner(libraries=libraries)
