"""What earlier probes measured: found again where it holds, left aside where it does not, and never in a probe's way."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from service_fakes import GIB, make_report, make_trial

from autobatch import Report, UnavailableError, UsageError, remember_out_of_memory
from autobatch.cache.consultation import Consultation
from autobatch.cache.identity import JobIdentity, command_identity, function_identity, workload_identity
from autobatch.cache.outlook import look_at_device
from autobatch.cache.remembered import cache_path, clear_all, opened_cache
from autobatch.cache.sources import hash_files, loaded_files
from autobatch.cache.uses import check_cache_use
from autobatch.command.template import CommandTemplate
from autobatch.facts import DeviceFacts
from autobatch.gpu.catalogue import find_card
from autobatch.options import ProbeOptions
from autobatch.probing import Noted
from autobatch.workload.job import TrainingJob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from autobatch.cache.uses import CacheUse
    from autobatch.known import KnownTrials
    from autobatch.probing import ProbeEvent

JOB = JobIdentity(name="job", job="0123456789abcdef")
CARD = find_card("L4")


def facts_of(report: Report, **changed: Any) -> DeviceFacts:
    """The device of a report, as if it were open."""
    facts = DeviceFacts(
        basis=report.basis,
        device=report.device,
        memory=report.memory,
        torch_version=report.versions.torch,
        cuda_version=report.versions.cuda,
        allocator_settings="",
    )
    return dataclasses.replace(facts, **changed)


def keep(
    report: Report, *, job: JobIdentity = JOB, files: Iterable[Path] = (), facts: DeviceFacts | None = None
) -> None:
    with opened_cache() as cache:
        cache.keep(job, report, facts or facts_of(report), [str(path) for path in files])


def recall(
    report: Report, *, job: JobIdentity = JOB, facts: DeviceFacts | None = None, **options: Any
) -> KnownTrials | None:
    asked = dataclasses.replace(report.options, **options)
    with opened_cache() as cache:
        return cache.recall(job, asked, facts or facts_of(report))


# ---- what is found again ---------------------------------------------------------------------------------------------


def test_trials_are_kept_and_found_again_with_their_age() -> None:
    """All of them, not a maximum alone, for the same job on the same card with the same versions."""
    report = make_report()
    assert recall(report) is None
    keep(report)
    known = recall(report)
    assert known is not None
    assert known.trials == report.trials
    assert known.measured_at == report.measured_at
    assert known.unchanged
    assert known.notes == ()


@pytest.mark.parametrize(
    "changed",
    [
        {"basis": "measured"},
        {"torch_version": "2.16.0"},
        {"cuda_version": "12.8"},
        {"allocator_settings": "expandable_segments:True"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_environment_knows_nothing(changed: dict[str, Any]) -> None:
    """Each of what the figures depend on parts one series from another."""
    report = make_report()
    keep(report)
    assert recall(report, facts=facts_of(report, **changed)) is None


@pytest.mark.parametrize("changed", [{"name": "NVIDIA L4"}, {"driver": "550.1"}, {"total_bytes": 41 * GIB}], ids=str)
def test_another_card_knows_nothing(changed: dict[str, Any]) -> None:
    """Nor another driver, nor a card of the same name with other memory."""
    report = make_report()
    keep(report)
    device = dataclasses.replace(report.device, **changed)
    assert recall(report, facts=facts_of(report, device=device)) is None


def test_another_job_or_more_steps_per_trial_know_nothing() -> None:
    """What was run for three steps does not vouch for ten."""
    report = make_report()
    keep(report)
    assert recall(report, job=dataclasses.replace(JOB, job="fedcba9876543210")) is None
    assert recall(report, min_windows=10) is None
    assert recall(report, target=512, headroom="10%", world_size=2) is not None


def test_trials_of_several_probes_are_put_together_the_newest_first() -> None:
    """A second question added trials: both are known afterwards, each window once, with the age of the newest."""
    first, second = make_report(largest=20), make_report(largest=37, target=512)
    keep(dataclasses.replace(first, measured_at="2026-01-01T00:00:00Z"))
    keep(second)
    known = recall(second)
    assert known is not None
    windows = [trial.window for trial in known.trials]
    assert len(set(windows)) == len(windows)
    assert {20, 21, 37, 38} == {trial.micro_batch_size for trial in known.trials}
    assert known.measured_at == second.measured_at


def test_files_that_changed_are_named(tmp_path: Path) -> None:
    """A trial has to show then that the job is what it was, also where the cache is to be trusted."""
    script, gone = tmp_path / "train.py", tmp_path / "helper.py"
    script.write_text("a = 1\n")
    gone.write_text("b = 1\n")
    report = make_report()
    keep(report, files=[script, gone])
    assert (recall(report) or pytest.fail("nothing known")).unchanged
    script.write_text("a = 2\n")
    gone.unlink()
    known = recall(report)
    assert known is not None
    assert not known.unchanged
    assert known.notes == ("changed since the earlier trials: helper.py, train.py",)
    consultation = Consultation(JOB, report.options, "trust", None)
    consultation.recall(facts_of(report))
    assert consultation.confirms


def test_what_no_longer_holds_is_replaced() -> None:
    """Of a series that a trial contradicted nothing stays; other series do."""
    report, other = make_report(), make_report(torch="2.14.0")
    keep(report)
    keep(other)
    consultation = Consultation(JOB, report.options, "confirm", None)
    assert consultation.recall(facts_of(report)) is not None
    smaller = make_report(largest=20)
    consultation.keep(smaller, facts_of(smaller), list)
    known = recall(smaller)
    assert known is not None
    assert max(trial.micro_batch_size for trial in known.trials) == 21
    assert recall(other) is not None


def test_a_hit_that_says_nothing_new_is_not_kept_again() -> None:
    """The age shown is that of the measurement, not of the last look at it."""
    report = make_report()
    keep(report)
    known = recall(report)
    assert known is not None
    from autobatch.report import Cached

    cached = Cached(measured_at=known.measured_at, measurement=known.measurements[0], num_trials=1, confirmed=True)
    Consultation(JOB, report.options, "confirm", None).keep(
        dataclasses.replace(report, cached=cached), facts_of(report), list
    )
    with opened_cache() as cache:
        assert len(cache.entries()) == 1


def test_the_cache_holds_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go."""
    monkeypatch.setattr("autobatch.cache.remembered._MOST_MEASUREMENTS", 3)
    for largest in (10, 20, 30, 40, 50):
        keep(make_report(largest=largest))
    with opened_cache() as cache:
        assert [entry.report.max_micro_batch_size for entry in cache.entries()] == [50, 40, 30]


# ---- a training that ran out of memory --------------------------------------------------------------------------------


def test_a_training_that_ran_out_lowers_the_bound_and_clearing_forgets_it() -> None:
    """The plan's own size counts as too large, with the day; trials at it or above are of no use."""
    report = make_report(largest=32)
    assert not remember_out_of_memory(report)  # the cache does not know it
    keep(report)
    assert remember_out_of_memory(report)
    known = recall(report)
    assert known is not None
    assert report.plan is not None
    assert known.limit == report.plan.micro_batch_size - 1
    assert not [trial for trial in known.trials if trial.micro_batch_size >= 32]
    assert "micro-batch 32 counts as too large: a training ran out of memory with it on 20" in known.notes[0]
    assert "autobatch cache clear" in known.notes[0]
    # A question without accumulation is another matter.
    whole = recall(report, target=32)
    assert whole is not None
    assert whole.notes == ()
    clear_all()
    assert recall(report) is None


# ---- without anything started ------------------------------------------------------------------------------------------


def trusted(
    options: ProbeOptions, *, job: JobIdentity = JOB, use: CacheUse = "trust"
) -> tuple[Report | None, list[ProbeEvent]]:
    told: list[ProbeEvent] = []
    report = Consultation(job, options, use, told.append).trusted_report(dict(os.environ))
    return report, told


@pytest.fixture
def measured() -> Report:
    """A report of this environment's torch on the emulated card of the question."""
    from autobatch.emulator.machine import DRIVER_VERSION
    from autobatch.emulator.torchbuild import find_torch

    build = find_torch()
    assert build is not None
    report = make_report(gpu="L4", torch=build.version, extra_trials=[make_trial(32, fits=True)])
    report = dataclasses.replace(
        report,
        device=dataclasses.replace(report.device, driver=DRIVER_VERSION),
        memory=dataclasses.replace(report.memory, headroom_bytes=report.options.headroom_bytes(CARD.nvml_total_bytes)),
    )
    keep(report)
    return report


def test_a_trusted_answer_starts_nothing(measured: Report) -> None:
    """The plan comes with the age of the measurement, and says that nothing confirmed it."""
    report, told = trusted(measured.options)
    assert report is not None
    assert report.plan == measured.plan
    assert report.cached is not None
    assert not report.cached.confirmed
    assert report.measured_at == measured.measured_at
    notes = [event.text for event in told if isinstance(event, Noted)]
    assert len(notes) == 1
    assert "trusted as they stand" in notes[0]
    assert trusted(measured.options, use="confirm")[0] is None


@pytest.mark.parametrize(
    "changed",
    [
        {"target": 100_000, "max_micro_batch": 20, "world_size": 1},  # a size that nobody ran
        {"tenant": "2GiB"},  # less room than any trial was known to take
        {"memory_limit": "20GiB"},
        {"min_windows": 9},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_not_known_in_full_is_not_trusted(measured: Report, changed: dict[str, Any]) -> None:
    """A probe runs then: nothing is guessed."""
    report, told = trusted(dataclasses.replace(measured.options, **changed))
    assert report is None
    assert told == []


def test_an_answer_that_was_not_certified_is_not_trusted(measured: Report) -> None:
    """Such as one of a job whose shapes come from values."""
    clear_all()
    keep(dataclasses.replace(measured, certified=False))
    assert trusted(measured.options)[0] is None


def test_another_torch_is_not_trusted_but_for_a_command(measured: Report) -> None:
    """A workload runs on the torch of this environment; a command on one of its own, which is taken to be the same."""
    clear_all()
    other = dataclasses.replace(measured, versions=dataclasses.replace(measured.versions, torch="1.0"))
    keep(other)
    assert trusted(other.options)[0] is None
    assert trusted(other.options, job=dataclasses.replace(JOB, torch_is_ours=False))[0] is not None


def test_the_first_size_of_a_command_is_what_its_plan_took(measured: Report) -> None:
    """Its device is known by its first trial only: that one is the confirmation."""
    assert measured.plan is not None
    consultation = Consultation(JOB, measured.options, "confirm", None)
    assert (
        consultation.first_size(dict(os.environ)) == measured.plan.micro_batch_size
        or consultation.first_size(dict(os.environ)) == measured.max_micro_batch_size
    )
    on_another = dataclasses.replace(measured.options, emulate="T4")
    assert Consultation(JOB, on_another, "confirm", None).first_size(dict(os.environ)) is None


def test_the_device_is_told_from_outside() -> None:
    """An emulated card by the catalogue; a real one by NVML, where the job sees the same devices as this process."""
    outlook = look_at_device(ProbeOptions(target=8, emulate="L4", tenant="1GiB"), {"PYTORCH_ALLOC_CONF": "x:1"})
    assert outlook is not None
    assert (outlook.basis, outlook.name, outlook.tenants_bytes, outlook.allocator_settings) == (
        "emulated",
        CARD.nvml_name,
        GIB,
        "x:1",
    )
    assert look_at_device(ProbeOptions(target=8), {**os.environ, "CUDA_VISIBLE_DEVICES": "7"}) is None
    assert look_at_device(ProbeOptions(target=8), dict(os.environ)) is None  # no GPU here


# ---- who is who -------------------------------------------------------------------------------------------------------


def test_a_workload_is_known_by_what_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name and parameters, however they are spelt; a module belongs to its folder, a file to its place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    assert workload_identity("gpt2?layers=12&seq_len=64").job == workload_identity("gpt2?seq_len=64&layers=12").job
    assert workload_identity("gpt2?seq_len=64").job != workload_identity("gpt2?seq_len=65").job
    by_name, by_path = workload_identity("train.py:job"), workload_identity(f"{tmp_path}/train.py:job")
    assert by_name.job == by_path.job
    assert by_name.files == (str(tmp_path / "train.py"),)
    here, builtin = workload_identity("train:job").job, workload_identity("gpt2").job
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert workload_identity("train:job").job != here
    assert workload_identity("gpt2").job == builtin


def test_a_command_is_known_by_its_words_its_folder_and_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that its arguments name belong to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "c.json").write_text('{"batch": 1}')
    words = ["python", "train.py", "--config=c.json", "--n", "{micro_batch_size}"]

    def identity(
        words: list[str], *, seq_len: int | None = None, edits: tuple[str, ...] = (), **options: Any
    ) -> JobIdentity:
        asked = ProbeOptions(**{"target": 8, **options})
        return command_identity(CommandTemplate.parse(words, edits), asked, seq_len)

    one = identity(words)
    assert one.files == (str(tmp_path / "train.py"), str(tmp_path / "c.json"))
    assert not one.torch_is_ours
    assert identity(words, target=64).job == one.job
    others = [
        identity([*words, "--fp16"]),
        identity(words, world_size=2),
        identity(words, seq_len=128),
        identity(words, edits=("c.json:batch={micro_batch_size}",)),
    ]
    monkeypatch.chdir("/")
    others.append(identity(["python", *words[1:]]))
    assert len({one.job, *(other.job for other in others)}) == 6


def test_a_function_is_known_by_its_name_its_code_and_what_it_trains() -> None:
    """A learning rate changes nothing; a shape, a type, a flag of the optimizer or the code does."""
    torch = pytest.importorskip("torch")

    def identity(step: Callable[[int], object], size: int = 4, name: str = "n", **settings: Any) -> str:
        model = torch.nn.Linear(size, 4, dtype=settings.pop("dtype", None))
        kind = settings.pop("kind", torch.optim.SGD)
        job = TrainingJob(micro_step=step, optimizer=kind(model.parameters(), **settings))
        return function_identity(name, job).job

    def step(n: int) -> int:
        return n

    same = [identity(step, lr=0.1), identity(step, lr=0.2)]
    others = [
        identity(lambda n: n + 1, lr=0.1),
        identity(step, 5, lr=0.1),
        identity(step, lr=0.1, name="m"),
        identity(step, lr=0.1, dtype=torch.float64),
        identity(step, lr=0.1, foreach=True),
        identity(step, lr=0.1, kind=torch.optim.AdamW),
    ]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 7


def test_files_of_the_user_are_those_that_were_imported_and_not_installed(tmp_path: Path) -> None:
    """Neither the standard library, nor what pip installed, nor this package."""
    (tmp_path / "helper.py").write_text("import json, pytest\n")
    (tmp_path / "main.py").write_text(
        "import helper, autobatch.plan\nfrom autobatch.cache.sources import loaded_files\nprint(*loaded_files(), sep='\\n')\n"
    )
    ran = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(tmp_path / "helper.py"), str(tmp_path / "main.py")]
    assert not any("site-packages" in path for path in loaded_files())


def test_what_cannot_be_hashed_is_left_out(tmp_path: Path) -> None:
    """A folder, a file that is gone, one of many megabytes."""
    (tmp_path / "a.py").write_text("x")
    with (tmp_path / "weights.pt").open("wb") as file:
        file.truncate(17 << 20)
    assert list(hash_files([tmp_path, tmp_path / "gone", tmp_path / "weights.pt", tmp_path / "a.py"])) == [
        str(tmp_path / "a.py")
    ]


# ---- what goes wrong with it --------------------------------------------------------------------------------------------


def asked_with(**options: Any) -> list[str]:
    """What is said where a probe asks a cache that cannot be used."""
    told: list[ProbeEvent] = []
    report = make_report()
    consultation = Consultation(JOB, report.options, "confirm", told.append)
    assert consultation.recall(facts_of(report)) is None
    consultation.keep(report, facts_of(report), list)
    return [event.text for event in told if isinstance(event, Noted)]


def test_a_file_that_is_no_cache_is_left_as_it_is_and_said_once() -> None:
    """The probe goes on; clearing does not remove what a mistyped variable names."""
    cache_path().parent.mkdir(parents=True)
    cache_path().write_text("these are my notes\n" * 100)
    (said,) = asked_with()
    assert said.startswith("the cache is not used: ")
    assert str(cache_path()) in said
    with pytest.raises(UsageError, match="is no cache of autobatch, and AUTOBATCH_CACHE names it: it is left as it is"):
        clear_all()
    assert cache_path().read_text().startswith("these are my notes")
    cache_path().unlink()
    with sqlite3.connect(cache_path()) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    (said,) = asked_with()
    assert "is no cache of autobatch" in said
    with pytest.raises(UsageError, match="left as it is"):
        clear_all()
    with sqlite3.connect(cache_path()) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]
    connection.close()


def test_a_cache_of_a_newer_version_is_left_alone() -> None:
    """An older autobatch beside a newer one loses nothing."""
    keep(make_report())
    with sqlite3.connect(cache_path()) as connection:
        connection.execute("UPDATE store_version SET version_num = '9999'")
    connection.close()
    (said,) = asked_with()
    assert "newer autobatch" in said
    with sqlite3.connect(cache_path()) as connection:
        assert connection.execute("SELECT count(*) FROM measurement").fetchone() == (1,)
    connection.close()


def test_a_place_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A probe goes on without; what asks for the cache itself is told."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOBATCH_CACHE", str(tmp_path / "file" / "m.sqlite3"))
    (said,) = asked_with()
    assert str(tmp_path / "file") in said
    with pytest.raises(UnavailableError, match="cannot make the cache"), opened_cache():
        pass
    with pytest.raises(UnavailableError, match="cannot make the cache"):
        remember_out_of_memory(make_report())


def test_a_cache_that_another_holds_locked_is_waited_for_and_then_gone_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe is never held up for long."""
    keep(make_report())
    monkeypatch.setattr("autobatch.store.database._BUSY_SECONDS", 0.2)
    blocker = sqlite3.connect(cache_path(), isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    (said,) = asked_with()
    assert "locked" in said
    assert time.monotonic() - started < 5
    blocker.close()
    assert recall(make_report()) is not None


def test_many_at_once_lose_nothing() -> None:
    """Processes that start at one moment make one cache, and each keeps its own."""
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_cache import keep, make_report\n"
        "sys.stdin.readline(); keep(make_report(largest=int(sys.argv[1])))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(10 + number), *sys.path], stdin=subprocess.PIPE)
        for number in range(4)
    ]
    with ThreadPoolExecutor(len(processes)) as pool:
        list(pool.map(lambda process: process.communicate(b"go\n", timeout=60), processes))
    assert [process.returncode for process in processes] == [0] * 4
    with opened_cache() as cache:
        assert sorted(entry.report.max_micro_batch_size or 0 for entry in cache.entries()) == [10, 11, 12, 13]
    assert oct(cache_path().stat().st_mode & 0o777) == "0o600"


def test_a_use_that_there_is_not_is_refused() -> None:
    """With those that there are."""
    with pytest.raises(UsageError, match="'maybe' is unknown; choose confirm, trust, off"):
        check_cache_use("maybe")


def test_off_neither_reads_nor_keeps() -> None:
    """Not even a file is made."""
    report = make_report()
    consultation = Consultation(JOB, report.options, "off", None)
    assert consultation.recall(facts_of(report)) is None
    assert consultation.first_size(dict(os.environ)) is None
    consultation.keep(report, facts_of(report), list)
    assert not cache_path().exists()


def test_the_cache_closes_what_it_opens() -> None:
    """No descriptor of its file stays open."""
    keep(make_report())
    recall(make_report())
    held = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    assert not [name for name in held if "measurements.sqlite3" in name]


# ---- found by those who tried to break it ----------------------------------------------------------------------------------


def test_trials_of_different_files_are_never_put_together(tmp_path: Path) -> None:
    """An edited job has a series of its own: that of the files as they are, or the newest where they are new again."""
    script = tmp_path / "train.py"
    before, after = make_report(largest=37), make_report(largest=20)
    for source, report in (("a = 1", before), ("a = 2", after)):
        script.write_text(source)
        keep(report, files=[script])
    for source, expected, unchanged in (
        ("a = 1", {37, 38}, True),
        ("a = 2", {20, 21}, True),
        ("a = 3", {20, 21}, False),
    ):
        script.write_text(source)
        known = recall(before)
        assert known is not None
        assert {trial.micro_batch_size for trial in known.trials} == expected
        assert known.unchanged is unchanged


def test_files_that_a_trial_showed_to_change_nothing_are_taken_on(tmp_path: Path) -> None:
    """After a comment and a confirmation the cache is as it was: it can be trusted again, and says nothing more of it."""
    from autobatch.report import Cached

    script = tmp_path / "train.py"
    script.write_text("a = 1")
    report = make_report()
    keep(report, files=[script])
    script.write_text("a = 1  # one")
    consultation = Consultation(JOB, report.options, "confirm", None)
    known = consultation.recall(facts_of(report))
    assert known is not None
    assert not known.unchanged
    cached = Cached(measured_at=known.measured_at, measurement=known.measurements[0], num_trials=1, confirmed=True)
    told = dataclasses.replace(report, cached=cached, warnings=(*known.notes, "another"))
    consultation.keep(told, facts_of(report), lambda: [str(script)])
    again = recall(report)
    assert again is not None
    assert (again.unchanged, again.notes) == (True, ())
    with opened_cache() as cache:
        assert len(cache.entries()) == 1


def test_what_was_said_of_changed_files_is_not_kept(tmp_path: Path) -> None:
    """A new measurement is one of the files as they are."""
    script = tmp_path / "train.py"
    script.write_text("a = 1")
    report = make_report()
    keep(report, files=[script])
    script.write_text("a = 2")
    consultation = Consultation(JOB, report.options, "confirm", None)
    known = consultation.recall(facts_of(report))
    assert known is not None
    consultation.keep(dataclasses.replace(report, warnings=(*known.notes, "another")), facts_of(report), list)
    with opened_cache() as cache:
        assert cache.entries()[0].report.warnings == ("another",)


def test_what_was_not_certified_is_confirmed_even_where_it_is_to_be_trusted() -> None:
    """Such as a job whose shapes come from values: only a trial says that again."""
    report = dataclasses.replace(make_report(), certified=False)
    keep(report)
    consultation = Consultation(JOB, report.options, "trust", None)
    assert consultation.recall(facts_of(report)) is not None
    assert consultation.confirms


def test_a_link_that_points_elsewhere_is_a_change(tmp_path: Path) -> None:
    """Releases are often switched by one."""
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "job.py").write_text(f"version = {version!r}")
    (tmp_path / "current").symlink_to("v1")
    report = make_report()
    keep(report, files=[tmp_path / "current" / "job.py"])
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("v2")
    known = recall(report)
    assert known is not None
    assert not known.unchanged


def test_a_failure_is_charged_to_the_job_that_failed() -> None:
    """Two folders with the same command have reports with the same fingerprint."""
    mine, other = JOB, dataclasses.replace(JOB, job="fedcba9876543210")
    report = dataclasses.replace(make_report(largest=32), measured_at="2026-11-20T10:00:00Z")
    later = dataclasses.replace(report, measured_at="2026-11-20T11:00:00Z")
    keep(report, job=mine)
    keep(later, job=other)
    assert remember_out_of_memory(report)
    lowered, untouched = recall(report, job=mine), recall(report, job=other)
    assert lowered is not None
    assert untouched is not None
    assert (lowered.limit, untouched.limit) == (31, None)


def test_a_limit_that_leaves_nothing_is_lifted_by_a_change(tmp_path: Path) -> None:
    """A script that was mended is not refused for ever."""
    script = tmp_path / "train.py"
    script.write_text("a = 1")
    report = make_report(largest=32)
    keep(report, files=[script])
    assert remember_out_of_memory(report)
    assert (recall(report, multiple_of=32) or pytest.fail("nothing known")).limit == 31
    script.write_text("a = 2")
    known = recall(report, multiple_of=32)
    assert known is not None
    assert known.limit is None
    assert (recall(report) or pytest.fail("nothing known")).limit == 31


def test_a_measurement_that_cannot_be_read_is_passed_over() -> None:
    """The others count; a list of them works."""
    keep(make_report(largest=20))
    keep(make_report(largest=30))
    with sqlite3.connect(cache_path()) as connection:
        connection.execute("UPDATE measurement SET report_json = '{}' WHERE id = (SELECT max(id) FROM measurement)")
    connection.close()
    known = recall(make_report(largest=20))
    assert known is not None
    assert {trial.micro_batch_size for trial in known.trials} == {20, 21}
    with opened_cache() as cache:
        assert len(cache.entries()) == 1


def test_whatever_is_wrong_with_it_the_probe_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no database takes; a home that there is not."""
    told: list[ProbeEvent] = []
    report = make_report()
    consultation = Consultation(dataclasses.replace(JOB, name="j\udce9"), report.options, "confirm", told.append)
    consultation.keep(report, facts_of(report), list)
    assert [event.text.partition(": ")[0] for event in told if isinstance(event, Noted)] == ["the cache is not used"]
    monkeypatch.setenv("AUTOBATCH_CACHE", "~nosuchuser/c")
    assert cache_path() == Path.cwd() / "~nosuchuser" / "c"


def test_whoever_makes_the_tables_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped while it did."""
    monkeypatch.setattr("autobatch.store.database._LONGEST_UPGRADE_SECONDS", 0.2)
    cache_path().parent.mkdir(parents=True)
    with Path(f"{cache_path()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (said,) = asked_with()
    assert "is held by another process that makes the tables" in said
