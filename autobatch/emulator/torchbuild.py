"""What can be learnt of the installed torch without importing it, which takes seconds."""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TorchBuild", "find_torch"]

# The libraries of NVIDIA whose calls the emulation answers for.
_CALLS = re.compile(
    r"(?:__cuda[A-Z]|cuda[A-Z]|cu[A-Z](?!pti)|cublas|cudnn|cufft|cusolver|cusparse|curand|nccl|nvml)\w+", re.ASCII
)
_HOST_ONLY = re.compile(r"cuFile|cupti")


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """The torch that `import torch` would load."""

    root: Path
    """Its package directory."""
    version: str
    cuda: str | None
    """The CUDA version that it was built for, such as "13.0"; None for a build without CUDA."""
    hip: str | None
    """The ROCm version that it was built for; None for the others."""

    @property
    def cuda_number(self) -> int:
        """`cuda` as the runtime counts it: 12080 for "12.8"; 0 for a build without CUDA."""
        if self.cuda is None:
            return 0
        major, minor = (*self.cuda.split("."), "0")[:2]
        return 1000 * int(major) + 10 * int(minor)

    def libraries(self) -> list[Path]:
        """Its shared libraries, in the order of their names."""
        return sorted((self.root / "lib").glob("lib*.so"))

    def imported_calls(self) -> frozenset[str]:
        """Names of the CUDA, cuBLAS, cuDNN, cuFFT, cuSOLVER, cuSPARSE and NCCL calls that its libraries import."""
        from elftools.elf.elffile import ELFFile  # a second's work, and only when something is built
        from elftools.elf.sections import SymbolTableSection

        calls: set[str] = set()
        for library in self.libraries():
            with library.open("rb") as file:
                symbols = ELFFile(file).get_section_by_name(".dynsym")
                if not isinstance(symbols, SymbolTableSection):
                    continue
                # An undefined symbol's section index lies at byte 6 of its 24-byte entry; names are read for those alone.
                data, names = symbols.data(), symbols.stringtable.data()
                for start in range(0, len(data), 24):
                    if data[start + 6 : start + 8] == b"\0\0":
                        offset = int.from_bytes(data[start : start + 4], "little")
                        name = names[offset : names.index(b"\0", offset)].decode("ascii", "replace")
                        if _CALLS.fullmatch(name) and not _HOST_ONLY.match(name):
                            calls.add(name)
        return frozenset(calls)


@functools.cache
def find_torch() -> TorchBuild | None:
    """Find the installed torch; None where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    try:
        text = (root / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    return TorchBuild(
        root=root,
        version=_assigned(text, "__version__") or "unknown",
        cuda=_assigned(text, "cuda"),
        hip=_assigned(text, "hip"),
    )


def _assigned(text: str, name: str) -> str | None:
    match = re.search(rf"^{name}(?:\s*:[^=]*)?\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None
