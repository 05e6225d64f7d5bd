"""The emulated machine: its state is shared, its ledger exact, and nothing of it is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autobatch.emulator.build import Libraries, find_compiler
from autobatch.emulator.machine import EmulatedMachine, _Machine
from autobatch.errors import EmulatorError, UsageError
from autobatch.gpu.catalogue import find_card
from autobatch.gpu.visible import visible_uuids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import ScriptRunner

SCRIPTS = Path(__file__).parent / "scripts"
DRIVER = SCRIPTS / "driver.py"
MIB = 1 << 20
T4 = find_card("T4")
A100 = find_card("A100-SXM4-40GB")


@contextlib.contextmanager
def holding(
    scripts: ScriptRunner, machine: EmulatedMachine, *sizes: int
) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A process that holds so much of each card; its pid and the statuses of its calls."""
    with scripts.start(machine, DRIVER, "hold", *map(str, sizes)) as process:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
        process.kill()


@pytest.fixture(scope="module")
def answers(scripts: ScriptRunner) -> Any:
    """What the driver and the runtime answer to right and wrong calls."""
    return scripts.run(DRIVER, ["T4"], "calls").answer


def test_sizes_beyond_the_card_are_out_of_memory(answers: Any) -> None:
    """A size near 2^63 or 2^64 does not wrap round to one that fits."""
    assert answers["allocations"]["huge"] == [2] * 6


def test_frees(answers: Any) -> None:
    """Freed once is success; twice, in the middle, or foreign is "invalid argument" (1)."""
    calls = answers["allocations"]
    assert (calls["free"], calls["double_free"], calls["inside"], calls["foreign"]) == (0, 1, 1, 1)


def test_allocations_are_charged_and_given_back(answers: Any) -> None:
    """4 MiB are 4 MiB, nothing is nothing, small ones share granules of 2 MiB, and all of it comes back."""
    calls = answers["allocations"]
    assert calls["taken"] == [0, 4 * MIB]
    assert calls["nothing"] == [0, None]
    assert calls["small_taken"] == -(-5000 * 1024 // (2 * MIB)) * 2 * MIB
    assert calls["leak"] == 0


def test_devices_that_are_not_there(answers: Any) -> None:
    """Such an ordinal is "invalid device ordinal" (101)."""
    assert (answers["allocations"]["set_device_99"], answers["allocations"]["set_device_minus_1"]) == (101, 101)


def test_event_misuse(answers: Any) -> None:
    """Times of events that were not recorded, carry none or are gone are "invalid resource handle" (400)."""
    assert answers["events"] == {
        "unrecorded": 400,
        "recorded": 0,
        "untimed": 400,
        "destroyed": 0,
        "destroyed_twice": 400,
        "recorded_after": 400,
        "none": 400,
    }


def test_capture_misuse(answers: Any) -> None:
    """A capture is begun once, ended once, and spoilt by waiting for its stream."""
    assert answers["captures"] == {"end_of_none": 401, "twice": 401, "wait": 900, "end_of_spoilt": 901}


def test_fork_after_use(answers: Any) -> None:
    """A child forked from a process that uses the card cannot: "initialization error" (3), as with the real driver."""
    assert answers["forked"] == 3


def test_more_processes_than_slots(scripts: ScriptRunner) -> None:
    """The 257th process gets "busy or unavailable" (46), which is not out of memory."""
    card = dataclasses.replace(find_card("B200"), context_bytes=MIB, context_low_bytes=MIB)
    with EmulatedMachine([card], scripts.libraries) as machine:
        output, errors = scripts.start(machine, DRIVER, "slots", "258").communicate(timeout=60)
    assert json.loads(output) == [0] * 256 + [46] * 2, errors


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2]),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("2, 0", [2, 0]),
        ("1,7,0", [1]),
        ("-1", []),
        ("0,-1,1", [0]),
        ("", []),
        ("1,1", []),
        ("nonsense", []),
        ("{1}", [1]),
        ("{2:.9},{0:.9}", [2, 0]),
        ("GPU-", []),
        ("GPU-zzz,{0}", []),
        ("{0},1", [0]),
        ("0,{1}", [0]),
    ],
)
def test_visible_devices(scripts: ScriptRunner, setting: str | None, expected: list[int]) -> None:
    """CUDA_VISIBLE_DEVICES is read as CUDA reads it, and as the rest of this package does."""
    with scripts.open("T4", "L4", "A100-SXM4-40GB") as machine:
        seen = scripts.start(machine, DRIVER, "devices")
        uuids = json.loads(seen.communicate(timeout=60)[0])
        variables = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting.format(*uuids)}
        output, errors = scripts.start(machine, DRIVER, "devices", variables=variables).communicate(timeout=60)
    assert json.loads(output) == [uuids[index] for index in expected], errors
    gpus = list(zip(uuids, ("T4", "L4", "A100"), strict=True))
    assert list(visible_uuids({**variables, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, gpus)) == json.loads(output)


def test_devices_of_different_sizes(scripts: ScriptRunner) -> None:
    """Each card has a ledger of its own, and the context is charged on each that is used."""
    with (
        scripts.open("T4", "A100-SXM4-40GB") as machine,
        holding(scripts, machine, 0, 20000 * MIB) as (process, statuses),
    ):
        assert statuses == [0, 0, 0]
        assert machine.process_bytes() == {process.pid: (T4.context_bytes, A100.context_bytes + 20000 * MIB)}


def test_killed_process_gives_its_memory_back(scripts: ScriptRunner) -> None:
    """After kill -9 the card is free for the next, also before the dead one is waited for."""
    most = T4.cuda_total_bytes - T4.context_bytes
    most -= most % (2 * MIB)
    with scripts.open("T4") as machine, holding(scripts, machine, most) as (process, statuses):
        assert statuses == [0, 0]
        with holding(scripts, machine, 0) as (_, refused):
            assert refused == [2]  # not even its context fits
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
        with holding(scripts, machine, most) as (_, again):
            assert again == [0, 0]


def test_tenant_beside_the_job(scripts: ScriptRunner) -> None:
    """A tenant's bytes are taken from the card for as long as the machine lives."""
    left = (T4.cuda_total_bytes - T4.context_bytes - 4096 * MIB) // (2 * MIB) * 2 * MIB
    with scripts.open("T4", tenant_bytes=4096 * MIB) as machine:
        with holding(scripts, machine, left + 2 * MIB) as (_, statuses):
            assert statuses == [0, 2]
        with holding(scripts, machine, left) as (_, statuses):
            assert statuses == [0, 0]


@pytest.mark.parametrize("tenant_bytes", [-1, T4.cuda_total_bytes + 1])
def test_tenant_too_large(scripts: ScriptRunner, tenant_bytes: int) -> None:
    """A tenant larger than the card, or less than nothing, is refused with both numbers."""
    with pytest.raises(UsageError, match=r"does not fit on T4, which has 14\.7"):
        scripts.open("T4", tenant_bytes=tenant_bytes)


@pytest.mark.parametrize("count", [0, 17])
def test_number_of_cards(scripts: ScriptRunner, count: int) -> None:
    """Between 1 and 16 cards."""
    with pytest.raises(UsageError, match=f"{count} emulated cards asked for: between 1 and 16"):
        scripts.open(*["T4"] * count)


def test_layout_of_another_version(scripts: ScriptRunner, tmp_path: Path) -> None:
    """Libraries whose state is laid out otherwise are refused before anything is shared."""
    compiler = find_compiler()
    assert compiler is not None
    (tmp_path / "other.c").write_text("unsigned long abg_layout_bytes(void) { return 1234; }\n")
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", "libautobatch-layout.so", "other.c"], cwd=tmp_path, check=True)
    with pytest.raises(EmulatorError, match="a state of 1234 bytes"):
        EmulatedMachine([T4], Libraries(folder=tmp_path))


def test_closed_machine_leaves_nothing(scripts: ScriptRunner) -> None:
    """The file goes with the machine, and a program started afterwards finds no card."""
    with scripts.open("T4") as machine:
        assert machine.path.exists()
        environment = machine.environment()
    assert not machine.path.exists()
    result = subprocess.run(
        [sys.executable, str(DRIVER), "devices"], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == []


def test_orphans_are_removed(scripts: ScriptRunner) -> None:
    """A killed owner's file goes when the next machine is made, but not while a process is still on it."""
    code = (
        "import sys, time; from autobatch.emulator.launch import open_machine\n"
        "with open_machine(['T4']) as machine: print(machine.path, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    owner = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    path = Path(owner.stdout.readline().strip())
    with scripts.open("T4") as other:
        assert path.exists(), "the owner lives"
        variables = {"AUTOBATCH_EMULATED_GPU": str(path)}
        with scripts.start(other, DRIVER, "hold", "0", variables=variables) as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline()) == [0]
            owner.kill()
            owner.communicate()
            with scripts.open("T4"):
                assert path.exists(), "a process is on it"
            process.kill()
        with scripts.open("T4"):
            assert not path.exists()


def test_environment(scripts: ScriptRunner) -> None:
    """What was preloaded stays, a choice of real cards goes, and the process's own environment is not touched."""
    base = {"LD_PRELOAD": "libother.so", "LD_LIBRARY_PATH": "/opt/lib", "CUDA_VISIBLE_DEVICES": "3", "HOME": "/root"}
    before = dict(base)
    with scripts.open("T4") as machine:
        made = machine.environment(base)
    assert made["LD_PRELOAD"] == f"{scripts.libraries.preload}:libother.so"
    assert made["LD_LIBRARY_PATH"] == f"{scripts.libraries.folder}:/opt/lib"
    assert "CUDA_VISIBLE_DEVICES" not in made
    assert made["HOME"] == "/root"
    assert base == before


def test_folder_with_a_blank(scripts: ScriptRunner, tmp_path: Path) -> None:
    """A cache below a folder with a blank in its name works, although LD_PRELOAD cannot say it."""
    folder = tmp_path / "my libraries"
    folder.symlink_to(scripts.libraries.folder)
    with EmulatedMachine([T4], Libraries(folder=folder)) as machine:
        output, errors = scripts.start(machine, DRIVER, "devices").communicate(timeout=60)
    assert (len(json.loads(output)), errors) == (1, "")


def test_folder_with_a_colon(tmp_path: Path) -> None:
    """A folder that no library path can hold is refused by name."""
    with pytest.raises(EmulatorError, match="cannot hold ':'"):
        EmulatedMachine([T4], Libraries(folder=tmp_path / "a:b"))


def test_lock_outlives_its_holder(scripts: ScriptRunner) -> None:
    """A process killed while it holds the ledger's lock gives it to the next."""
    code = (
        "import ctypes, mmap, os, signal, sys\n"
        "file = os.open(os.environ['AUTOBATCH_EMULATED_GPU'], os.O_RDWR)\n"
        "room = mmap.mmap(file, 0)\n"
        f"lock = ctypes.c_char.from_buffer(room, {_Machine.lock.offset})\n"
        "assert ctypes.CDLL(None).pthread_mutex_lock(ctypes.byref(lock)) == 0\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with scripts.open("T4") as machine:
        killed = subprocess.run([sys.executable, "-c", code], env=machine.environment(), check=False)
        assert killed.returncode == -signal.SIGKILL
        process = scripts.start(machine, DRIVER, "hold", "0")
        try:
            assert json.loads(process.communicate(timeout=20)[0]) == [0]
        finally:
            process.kill()
