"""What all recordings of a card have in common: the machine that they were made on, and files that are whole or not there."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
KEPT = ROOT / "tests/data/real"
"""Where recordings are kept: a folder for each card."""


def machine_facts() -> dict[str, Any]:
    """The card, the driver and the libraries, as this process finds them; it starts CUDA."""
    import torch

    from autobatch import __version__
    from autobatch.emulator.machine import DRIVER_VERSION
    from autobatch.gpu.nvml import NvmlSession

    torch.cuda.init()
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    with NvmlSession() as session:
        device = session.device(0)
        memory = device.memory()
        driver = session.driver_version
        name = device.name
        own = device.process_bytes(os.getpid())
    return {
        "basis": "emulated" if driver == DRIVER_VERSION else "measured",
        "card": name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "nvml_total_bytes": memory.total_bytes,
        "nvml_reserved_bytes": memory.reserved_bytes,
        "nvml_free_bytes": memory.free_bytes,
        "nvml_own_bytes": own,
        "cuda_total_bytes": total,
        "cuda_free_bytes": free,
        "driver": driver,
        "autobatch": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def write_recording(path: Path, content: Any) -> None:
    """Write JSON, packed where the name ends in `.gz`: aside first, so that a file that is there is whole."""
    packed = json.dumps(content, separators=(",", ":")).encode()
    if path.suffix == ".gz":
        packed = gzip.compress(packed, mtime=0)  # no time in it: the same figures give the same bytes
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(packed)
    aside.replace(path)


def read_recording(path: Path) -> Any:
    """Read what `write_recording` wrote."""
    content = path.read_bytes()
    return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)


def end_in_order() -> None:
    """Let SIGTERM end this process by `SystemExit`, so that what it started is ended, and what it has is written."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)
