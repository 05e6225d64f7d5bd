"""Run a recording again on an emulated card: the other side of the comparison. It needs no GPU.

    python tests/gpu/emulated.py FOLDER [--card NAME] [--seconds S] [--workers N]

FOLDER holds `fidelity.json.gz` and, if there is one, `workspaces.json.gz`; beside them come `fidelity-emulated.json.gz` and
`workspaces-emulated.json.gz`. Use the version of torch that the recording was made with: each has its own allocator and cuDNN.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from fidelity import COLUMNS, Recording, emulate
from recordings import end_in_order, read_recording, say


def main() -> int:
    """Run it again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--card", help="the card to emulate; that of the recording where it is not given")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 4), help="processes at once")
    asked = parser.parse_args()
    end_in_order()
    began = time.monotonic()
    measured = read_recording(asked.folder / "fidelity.json.gz")
    card = asked.card or measured["machine"]["card"]
    import torch

    if torch.__version__ != measured["machine"]["torch"]:
        say(f"  the recording is of torch {measured['machine']['torch']}, this is torch {torch.__version__}")
    if (asked.folder / "workspaces.json.gz").exists():
        script = [str(Path(__file__).with_name("workspaces.py")), str(asked.folder / "workspaces-emulated.json.gz")]
        script += ["--like", str(asked.folder / "workspaces.json.gz"), "--seconds", f"{asked.seconds:.0f}"]
        subprocess.run([sys.executable, "-m", "autobatch", "emulate", card, "--", sys.executable, *script], check=True)
    content = {"columns": COLUMNS, "settings": []}
    recording = Recording(asked.folder / "fidelity-emulated.json.gz", content, wanted=(), caps=())
    left = asked.seconds - (time.monotonic() - began)
    emulate(measured, recording, card=card, seconds=left, workers=asked.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
