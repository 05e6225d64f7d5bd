"""The build: once for each version, whole or not at all, and a clear word where it cannot be done."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import autobatch.emulator
from autobatch.emulator.build import build_libraries, find_compiler
from autobatch.emulator.torchbuild import TorchBuild
from autobatch.errors import EmulatorError

CSRC = Path(autobatch.emulator.__file__).parent / "csrc"
NUM_LIBRARIES = 4


@pytest.fixture
def torch_build(tmp_path: Path) -> TorchBuild:
    """A torch without libraries, so that nothing is read for seconds."""
    return TorchBuild(root=tmp_path / "torch", version="0", cuda="13.0", hip=None)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes its time and makes empty files, named by CC; its runs stand in `runs` beside it."""
    return fake_compiler(
        tmp_path,
        monkeypatch,
        f'echo run >> {tmp_path}/runs\nsleep "${{COMPILER_SECONDS:-0.05}}"\n'
        'while [ "$1" != -o ]; do shift; done\ntouch "$2"\n',
    )


def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    path = tmp_path / "fake-cc"
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return path


def num_runs(compiler: Path) -> int:
    return len((compiler.parent / "runs").read_text().splitlines())


def test_built_once(torch_build: TorchBuild, compiler: Path, tmp_path: Path) -> None:
    """The second call finds what the first built, under a hash, and starts no compiler."""
    first = build_libraries(torch_build, cache=tmp_path / "cache")
    assert num_runs(compiler) == NUM_LIBRARIES
    assert build_libraries(torch_build, cache=tmp_path / "cache") == first
    assert num_runs(compiler) == NUM_LIBRARIES
    assert all(path.exists() for path in (first.preload, first.driver, first.nvml, first.layout))


def test_another_torch_is_another_build(torch_build: TorchBuild, compiler: Path, tmp_path: Path) -> None:
    """The folder's name depends on torch's version and libraries."""
    first = build_libraries(torch_build, cache=tmp_path / "cache")
    (torch_build.root / "lib").mkdir(parents=True)
    shutil.copy(sys.executable, torch_build.root / "lib" / "libtorch_cuda.so")
    assert build_libraries(torch_build, cache=tmp_path / "cache").folder != first.folder


def test_two_builds_at_once_are_one(torch_build: TorchBuild, compiler: Path, tmp_path: Path) -> None:
    """Builds that meet compile once, and all get the result."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: build_libraries(torch_build, cache=tmp_path / "cache"), range(4)))
    assert num_runs(compiler) == NUM_LIBRARIES
    assert len(set(found)) == 1


def test_killed_build_leaves_nothing(torch_build: TorchBuild, compiler: Path, tmp_path: Path) -> None:
    """What a build killed half-way leaves is no result, and the next build removes it."""
    cache = tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; from autobatch.emulator.build import build_libraries as b; "
        "from autobatch.emulator.torchbuild import TorchBuild as T; "
        f"b(T(root=Path({str(torch_build.root)!r}), version='0', cuda='13.0', hip=None), cache=Path({str(cache)!r}))"
    )
    environment = {**os.environ, "COMPILER_SECONDS": "30", "PYTHONPATH": str(Path(autobatch.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "runs").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in cache.glob(".building-*")], "it was killed before or after, not while it built"
    folder = build_libraries(torch_build, cache=cache).folder
    assert sorted(path.name for path in cache.iterdir()) == [".lock", folder.name]


def test_incomplete_folder_is_built_again(torch_build: TorchBuild, compiler: Path, tmp_path: Path) -> None:
    """A result of which a part was removed is no result."""
    build_libraries(torch_build, cache=tmp_path / "cache").nvml.unlink()
    assert build_libraries(torch_build, cache=tmp_path / "cache").nvml.exists()


def test_no_compiler(torch_build: TorchBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any compiler, the error names the package to install."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    if find_compiler() is not None:
        pytest.skip("ziglang is installed: there is always a compiler")
    with pytest.raises(EmulatorError, match="apt install gcc"):
        build_libraries(torch_build, cache=tmp_path / "cache")


def test_unwritable_cache(torch_build: TorchBuild, compiler: Path, tmp_path: Path) -> None:
    """A cache that cannot be written is named, with the variable that moves it."""
    (tmp_path / "file").touch()
    with pytest.raises(EmulatorError, match=r"file/cache \(Not a directory\): set XDG_CACHE_HOME"):
        build_libraries(torch_build, cache=tmp_path / "file" / "cache")


def test_compile_error(torch_build: TorchBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's first error is in the message, and nothing is left."""
    fake_compiler(
        tmp_path, monkeypatch, "echo 'state.c: In function f:' >&2\necho 'state.c:3: error: boom' >&2\nexit 1\n"
    )
    with pytest.raises(EmulatorError, match=r"libcuda\.so\.1.*state\.c:3: error: boom"):
        build_libraries(torch_build, cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_sources_have_no_warnings() -> None:
    """Every source compiles without a warning."""
    compiler = find_compiler()
    assert compiler is not None
    sources = sorted(str(path) for path in CSRC.glob("*.c"))
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    result = subprocess.run([*compiler, *flags, *sources], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
