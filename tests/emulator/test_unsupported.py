"""Every call that torch makes ends in the emulation: nothing reaches a real CUDA library."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from autobatch.emulator.torchbuild import find_torch

if TYPE_CHECKING:
    from pathlib import Path

    from autobatch.emulator.build import Libraries

SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
LIBRARIES = "cudart", "cublas", "cublasLt", "cudnn", "cufft", "cusolver", "cusparse", "cusparseLt", "curand", "nccl"


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
