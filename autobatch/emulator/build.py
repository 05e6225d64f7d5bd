"""Compile the emulated GPU's libraries, once for each version of the sources and of torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.resources
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.emulator.torchbuild import TorchBuild, find_torch
from autobatch.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Libraries", "build_libraries", "find_compiler"]

_DRIVER = "libcuda.so.1"
_NVML = "libnvidia-ml.so.1"
_PRELOAD = "libautobatch-emulator.so"
_LAYOUT = "libautobatch-layout.so"
_SOURCES = {
    _DRIVER: ("state.c", "contents.c", "driver.c", "driver_memory.c", "driver_streams.c", "driver_modules.c"),
    _NVML: ("nvml.c",),
    _PRELOAD: ("runtime.c", "fatbin.c", "cublas.c", "cudnn.c", "described.c", "nccl.c"),
    _LAYOUT: ("layout.c",),
}
_BUILDING = ".building-"
_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")

# Each library's own code for "not supported", as its header has it; torch prints it beside the call's name.
_NOT_SUPPORTED = {
    "cublas": 15,
    "cudnn": 3000,
    "cufft": 16,
    "cusolver": 9,
    "cusparse": 10,
    "curand": 999,
    "nccl": 5,
    "nvml": 3,
    "cu": 801,
    "__cuda": 801,
}


@dataclass(frozen=True, kw_only=True)
class Libraries:
    """The compiled libraries of the emulated GPU."""

    folder: Path
    """Where they lie: for `LD_LIBRARY_PATH`, by which NVML's bindings and Triton find theirs."""

    @property
    def preload(self) -> Path:
        """The library for `LD_PRELOAD`."""
        return self.folder / _PRELOAD

    @property
    def driver(self) -> Path:
        """The emulated `libcuda.so.1`."""
        return self.folder / _DRIVER

    @property
    def nvml(self) -> Path:
        """The emulated `libnvidia-ml.so.1`."""
        return self.folder / _NVML

    @property
    def layout(self) -> Path:
        """What the maker of a machine loads itself: the driver, once loaded, would be taken for the real one."""
        return self.folder / _LAYOUT


def find_compiler() -> list[str] | None:
    """Find a C compiler: `$CC`, cc, gcc, clang, or the one in the `ziglang` package; None where there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = name.split()
        if words and shutil.which(words[0]):
            return words
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    return None


def build_libraries(torch_build: TorchBuild | None = None, *, cache: Path | None = None) -> Libraries:
    """Compile the libraries, or find them compiled.

    Args:
        torch_build: the torch whose imports are answered; the installed one where None.
        cache: folder to keep them in; the user's cache folder where None.

    Returns:
        The libraries, in a folder named by a hash of the sources and of torch's libraries.

    Raises:
        EmulatorError: there is no C compiler, or it failed, or the cache cannot be written.
    """
    torch_build = torch_build or find_torch()
    if cache is None:
        import platformdirs

        cache = platformdirs.user_cache_path("autobatch") / "emulator"
    folder = cache / _key(torch_build)
    if not _is_complete(folder):
        _compile_into(folder, torch_build)
    return Libraries(folder=folder)


def _is_complete(folder: Path) -> bool:
    return all((folder / library).exists() for library in _SOURCES)


def _source_files() -> dict[str, str]:
    folder = importlib.resources.files("autobatch.emulator") / "csrc"
    return {
        entry.name: entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name[-2:] in {".c", ".h"}
    }


def _key(torch_build: TorchBuild | None) -> str:
    digest = hashlib.sha256(repr(sorted(_source_files().items())).encode())
    for module in ("build.py", "torchbuild.py"):  # they choose flags, and which calls are answered for
        digest.update((importlib.resources.files("autobatch.emulator") / module).read_bytes())
    if torch_build is not None:
        # Not their times: an image of a container rounds them, and what was compiled into it would count no more.
        facts = [(path.name, path.stat().st_size) for path in torch_build.libraries()]
        digest.update(repr((torch_build.version, facts)).encode())
    return digest.hexdigest()[:20]


def _compile_into(folder: Path, torch_build: TorchBuild | None) -> None:
    compiler = find_compiler()
    if compiler is None:
        raise EmulatorError(
            "the emulated GPU needs a C compiler once and none was found: install one (Debian, Ubuntu: apt install gcc; "
            "Fedora: dnf install gcc; anywhere: pip install ziglang), or set CC"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent):
            _remove_debris(folder)
            if not folder.exists():  # else another process built it meanwhile
                _compile_with(compiler, folder, torch_build)
    except OSError as error:
        raise EmulatorError(
            f"cannot keep the emulated GPU in {folder.parent} ({error.strerror}): set XDG_CACHE_HOME to a writable folder"
        ) from error


def _compile_with(compiler: list[str], folder: Path, torch_build: TorchBuild | None) -> None:
    # Built aside and moved into place whole: what a killed build leaves is never taken for a result.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_BUILDING) as temporary:
        work = Path(temporary)
        _write_sources(work, torch_build)
        for library in _SOURCES:
            _compile(compiler, work, library)
        finished = work / "finished"
        finished.mkdir()
        for library in _SOURCES:
            (work / library).rename(finished / library)
        finished.rename(folder)


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Hold the cache alone, so that two builds at once are one; without locks (some network drives), both build."""
    with (cache / ".lock").open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_debris(folder: Path) -> None:
    """Remove what killed builds left, and this folder where part of it was removed by hand."""
    for path in folder.parent.glob(f"{_BUILDING}*"):
        shutil.rmtree(path, ignore_errors=True)
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)


def _write_sources(work: Path, torch_build: TorchBuild | None) -> None:
    sources = _source_files()
    for name, text in sources.items():
        (work / name).write_text(text, encoding="utf-8")
    imported = torch_build.imported_calls() if torch_build else frozenset()
    missing = sorted(imported - _implemented(sources))
    lines = ['#include "unsupported.h"', *(_refusal(name) for name in missing)]
    (work / "unsupported.c").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _implemented(sources: dict[str, str]) -> frozenset[str]:
    """Names that the C sources define: exported functions, and those that their macros make."""
    text = "\n".join(sources.values())
    names = set(re.findall(r"^ABG_EXPORT [\w *]*?\b(\w+)\(", text, re.MULTILINE))
    names |= set(re.findall(r"^(?:COMPUTES|MAKES|ENDS|NOTES|NO_PROCESSES|NOT_SUPPORTED)\((\w+)\)", text, re.MULTILINE))
    for head, tail in re.findall(r"^COMPUTES_SDCZ\((\w+), (\w+)\)", text, re.MULTILINE):
        names |= {f"{head}{kind}{tail}" for kind in "SDCZ"}
    return frozenset(names)


def _refusal(name: str) -> str:
    return f"ABG_UNSUPPORTED_TEXT({name})" if name.endswith("String") else f"ABG_UNSUPPORTED({name}, {_status(name)})"


def _status(name: str) -> int:
    return next(status for prefix, status in _NOT_SUPPORTED.items() if name.startswith(prefix))


def _compile(compiler: list[str], work: Path, library: str) -> None:
    sources = [*_SOURCES[library], *(["unsupported.c"] if library == _PRELOAD else [])]
    command = [*compiler, *_FLAGS, f"-Wl,-soname,{library}", "-Wl,-rpath,$ORIGIN", "-o", library, *sources]
    if library in {_NVML, _PRELOAD}:
        command.append(_DRIVER)
    if library == _PRELOAD:
        command += ["-Wl,--no-as-needed", _NVML]  # so that NVML's bindings find it loaded, by its name
    command += ["-ldl", "-lrt"]
    environment = {**os.environ, "LC_ALL": "C"}  # so that its errors are called errors
    environment.pop("LD_PRELOAD", None)
    result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise EmulatorError(
            f"{compiler[0]} could not compile the emulated GPU ({library}): {_first_error(result.stderr)}"
        )


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
