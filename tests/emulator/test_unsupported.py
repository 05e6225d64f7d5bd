"""What the emulation does not have fails by name, and nothing reaches a real CUDA library."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from autobatch.emulator.torchbuild import find_torch

if TYPE_CHECKING:
    from conftest import ScriptRunner

    from autobatch.emulator.build import Libraries

SCRIPT = Path(__file__).parent / "scripts" / "unsupported.py"
SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
LIBRARIES = "cudart", "cublas", "cublasLt", "cudnn", "cufft", "cusolver", "cusparse", "cusparseLt", "curand", "nccl"


@pytest.fixture(scope="module")
def run(scripts: ScriptRunner) -> Any:
    """Every call that is not there, made once."""
    return scripts.run(SCRIPT, ["T4"])


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("fft", "cufftCreate"),
        ("svd", "cusolverDn"),
        ("lstm", "cudnnCreateDropoutDescriptor"),
        ("gru", "cudnnCreateDropoutDescriptor"),
        ("sparse", "cusparseCreate"),
    ],
)
def test_fails_by_name(run: Any, operation: str, call: str) -> None:
    """The operation raises, and the machine knows the name of the call."""
    assert run.answer[operation] is not None
    assert any(name.startswith(call) for name in run.unsupported_calls), run.unsupported_calls


def test_error_text_names_the_call(run: Any) -> None:
    """Where the library gives its errors a text, the text has the name."""
    assert "the emulated GPU does not implement cudnnCreateDropoutDescriptor" in run.answer["lstm"]


def test_process_goes_on(run: Any) -> None:
    """A refused call does no harm to the next."""
    assert run.answer["still_works"] == "torch.Size([8, 8])"


def symbols(path: Path, *, defined: bool) -> set[str]:
    """Names in a library's dynamic symbol table, defined there or imported."""
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        if not isinstance(table, SymbolTableSection):
            return set()
        names, entries = table.stringtable.data(), SYMBOL.iter_unpack(table.data())
        starts = [start for start, _, _, section, _, _ in entries if (section != 0) is defined]
    return {names[start : names.index(b"\0", start)].decode() for start in starts}


def test_every_imported_call_is_defined(libraries: Libraries) -> None:
    """Whatever torch imports that a CUDA library of NVIDIA's defines, the preloaded library defines before it."""
    build = find_torch()
    assert build is not None
    imported = set().union(*(symbols(path, defined=False) for path in build.libraries()))
    real = [p for name in LIBRARIES for p in build.root.parent.glob(f"nvidia/**/lib{name}.so.*")]
    if not real:
        pytest.skip("NVIDIA's libraries are not beside torch")
    offered = set().union(*(symbols(path, defined=True) for path in real))
    needed = {name for name in imported & offered if not name.startswith("_Z") and name not in {"_init", "_fini"}}
    assert len(needed) > 400
    assert needed - symbols(libraries.preload, defined=True) == set()
