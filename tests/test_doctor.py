"""What is examined on a machine, and when a probe can run there."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest

from autobatch.cli import main
from autobatch.doctor import Finding, examine, has_way_to_probe
from autobatch.gpu.presence import find_presence

if TYPE_CHECKING:
    from pathlib import Path


def finding(needed_for: str, *, ok: bool) -> Finding:
    return Finding(what=needed_for, ok=ok, found="", needed_for=needed_for)


@pytest.mark.parametrize(
    ("both", "measure", "emulate", "can"),
    [
        (True, True, True, True),
        (True, True, False, True),
        (True, False, True, True),
        (True, False, False, False),
        (False, True, True, False),
    ],
)
def test_a_probe_needs_a_card_or_an_emulation(both: bool, measure: bool, emulate: bool, can: bool) -> None:
    """One of the two ways is enough; what both need is needed."""
    findings = [finding("both", ok=both), finding("measure", ok=measure), finding("emulate", ok=emulate)]
    assert has_way_to_probe(findings) is can


def test_everything_is_looked_at_and_everything_missing_has_a_mend() -> None:
    """A finding that something is missing, without what to do about it, helps nobody."""
    findings = examine()
    assert [each.what for each in findings] == [
        "system",
        "torch",
        "packages",
        "GPU",
        "allocator",
        "C compiler",
        "shared memory",
        "emulated GPU",
    ]
    assert all(each.found for each in findings)
    assert all(each.mend for each in findings if not each.ok)


def test_a_missing_package_is_named_with_the_command_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `doctor`, and in one line by whatever needs it; never by a traceback."""
    find_spec = importlib.util.find_spec
    absent = {"elftools", "tomlkit"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else find_spec(name))
    found = {each.what: each for each in examine()}
    assert not found["packages"].ok
    assert found["packages"].mend == "pip install pyelftools tomlkit"
    assert found["emulated GPU"].mend == "pip install pyelftools"

    def needs_it() -> None:
        raise ModuleNotFoundError("No module named 'tomlkit'", name="tomlkit")

    monkeypatch.setattr("autobatch.doctor.examine", needs_it)
    assert main(["doctor"]) == 69
    error = capsys.readouterr().err
    assert "No module named 'tomlkit': pip install pyelftools tomlkit" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),
        ("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync"),
        ("PYTORCH_ALLOC_CONF", "backend: cudaMallocAsync"),
    ],
)
def test_an_allocator_that_cannot_be_measured(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a probe refuses is found before the probe."""
    monkeypatch.setenv(name, value)
    found = {each.what: each for each in examine()}
    assert not found["allocator"].ok
    assert "cudaMallocAsync" in found["allocator"].mend or "unset" in found["allocator"].mend
    assert not has_way_to_probe(examine())


def test_without_a_compiler_and_anything_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be compiled and nothing is in the cache, the packages to install are named."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = {each.what: each for each in examine()}
    if found["C compiler"].ok:
        pytest.skip(f"a compiler that needs no PATH is installed: {found['C compiler'].found}")
    assert "gcc" in found["C compiler"].mend
    assert not found["emulated GPU"].ok
    assert "gcc" in found["emulated GPU"].mend


def test_an_emulated_card_that_is_gone_is_a_sign_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process of `autobatch emulate` that outlived its machine is not taken for one that never had a card."""
    if find_presence().usable:
        pytest.skip("a GPU is here")
    monkeypatch.setenv("AUTOBATCH_EMULATED_GPU", str(tmp_path / "gone"))
    presence = find_presence()
    assert presence.any_sign
    assert not presence.usable
    assert os.environ["AUTOBATCH_EMULATED_GPU"] in presence.problem
