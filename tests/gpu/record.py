"""All that a machine with an NVIDIA GPU can tell, in ten minutes: the tests that need a card, and recordings of what it does.

    tests/gpu/run.sh [FOLDER] [--seconds S] [--only PART …] [--resume FOLDER] [--bundle FILE] [--quick] [--emulate CARD]

Parts, each for a share of the time; what one leaves is there for those after it:

    doctor       what works on this machine
    tests        the tests marked `gpu`
    fidelity     what training takes: see fidelity.py
    workspaces   what cuDNN takes besides: see workspaces.py
    peers        the finders of others, with seconds: see peers.py
    throughput   samples per second against size, and the plan by it
    emulated     `fidelity` and `workspaces` again on an emulated card, beside the parts that follow: see emulated.py

A part that fails, or runs out of time, keeps none of the others from running; `summary.json` tells of each. After each part
`--bundle` packs all that is there into one file, for a machine from which little comes back. What is worth keeping goes from the
folder into `tests/data/real/<card>/`. With `--emulate` everything runs on an emulated card: a rehearsal, which shows that it
runs, and nothing about a card.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from recordings import ROOT, end_in_order, read_recording, say, write_recording

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
SHARES = {"doctor": 0.02, "fidelity": 0.42, "workspaces": 0.1, "tests": 0.26, "throughput": 0.08, "peers": 0.12}
"""Of the time, in the order in which the parts run."""
PARTS = (*SHARES, "emulated")
_LEAST_SECONDS = {"doctor": 30.0, "throughput": 60.0}
"""Where the emulated GPU is not built yet, that takes a while; and a probe has nothing to show before its end."""
_EXTRA_SECONDS = 15.0
"""For a part to end by itself after its time, before it is ended."""
_NEEDED = {"torch": "torch", "pynvml": "nvidia-ml-py", "psutil": "psutil", "rich": "rich"}
_OPTIONAL = {
    "pytest": ("pytest", "tests"),
    "pytest_timeout": ("pytest-timeout", "tests"),
    "platformdirs": ("platformdirs", "emulated"),
    "elftools": ("pyelftools", "emulated"),
}


@dataclass
class PartEnded:
    """How a part went."""

    part: str
    state: str
    """`done`, `failed`, `out of time` or `left out`."""
    seconds: float = 0.0
    detail: str = ""


class Running:
    """A part that runs; what it prints goes to a log."""

    def __init__(
        self, part: str, command: Sequence[str], log: Path, *, stdout: Path | None = None, nice: int = 0
    ) -> None:
        self.part, self._began = part, time.monotonic()
        self._log = log.open("w+")
        self._out: IO[str] | None = stdout.open("w") if stdout else None
        prefix = ["nice", "-n", str(nice)] if nice else []
        self._process = subprocess.Popen(
            [*prefix, *command],
            cwd=ROOT,
            stdout=self._out or self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> PartEnded:
        """Let it run so long; then it and all that it started are ended."""
        state = "done"
        try:
            status = self._process.wait(max(0.0, seconds))
            # What doctor finds amiss is what it is asked for.
            state = "done" if status == 0 or self.part == "doctor" else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        self.close()
        said = [
            Path(stream.name).read_text(errors="replace") for stream in (self._out, self._log) if stream is not None
        ]
        lines = "\n".join(said).strip().splitlines()
        detail = "" if state == "done" else (lines or ["it gave no reason"])[-1]
        return PartEnded(part=self.part, state=state, seconds=round(time.monotonic() - self._began, 1), detail=detail)

    def close(self) -> None:
        """End it, if it still runs."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        for stream in (self._log, self._out):
            if stream is not None:
                stream.close()


class Session:
    """One run of everything."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.folder: Path = asked.folder
        self._asked = asked
        self._deadline = time.monotonic() + asked.seconds
        self._background: Running | None = None
        self.ended: list[PartEnded] = []

    def run(self, parts: Sequence[str]) -> None:
        """Run them in turn."""
        try:
            shares = {part: share for part, share in SHARES.items() if part in parts}
            for place, part in enumerate(shares):
                left = self._deadline - time.monotonic()
                seconds = left * shares[part] / sum(list(shares.values())[place:])
                self._note(self._run_part(part, max(seconds, min(left, _LEAST_SECONDS.get(part, 0.0)))))
                if part == "workspaces" and "emulated" in parts:
                    self._start_emulated()
            if "emulated" in parts and "workspaces" not in parts:
                self._start_emulated()
            if self._background is not None:
                say("emulated: waiting for it")
                self._note(self._background.wait(self._deadline - time.monotonic() + _EXTRA_SECONDS))
        finally:
            if self._background is not None:
                self._background.close()

    def _note(self, ended: PartEnded) -> None:
        self.ended.append(ended)
        say(f"{ended.part}: {ended.state} in {ended.seconds:.0f} s{f': {ended.detail}' if ended.detail else ''}")
        write_recording(self.folder / "summary.json", [asdict(one) for one in self.ended])
        if self._asked.bundle:
            pack(self.folder, self._asked.bundle)

    def _run_part(self, part: str, seconds: float) -> PartEnded:
        if missing := _missing_for(part):
            return PartEnded(part=part, state="left out", detail=f"it needs {missing}")
        if seconds < 5:
            return PartEnded(part=part, state="left out", detail="no time was left")
        say(f"{part}: up to {seconds:.0f} s")
        command, stdout = self._command(part, seconds)
        running = Running(part, command, self.folder / f"{part}.log", stdout=stdout)
        try:
            return running.wait(seconds + _EXTRA_SECONDS)
        finally:
            running.close()

    def _command(self, part: str, seconds: float) -> tuple[list[str], Path | None]:
        folder, python = self.folder, sys.executable
        quick = ["--quick"] if self._asked.quick else []
        ours = [python, "-m", "autobatch"]
        if part == "doctor":
            return [*ours, "doctor", "--format", "json"], folder / "doctor.json"
        if part == "tests":
            options = ["-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--timeout", "200"]
            # Ended by itself, it still says why each test failed.
            options += ["--session-timeout", f"{max(10.0, seconds - 5):.0f}", "--tb", "short"]
            options += ["-k", "nvml or thrash"] if self._asked.quick else []
            return [python, "-m", "pytest", *options, "-v", "tests/gpu"], folder / "tests.txt"
        if part == "throughput":
            options = ["--target", "256", "--memory-limit", "24GiB", "--no-cache"]
            if not os.environ.get("AUTOBATCH_EMULATED_GPU"):  # which knows no time
                options += ["--objective", "throughput"]
                if importlib.util.find_spec("matplotlib"):
                    options += ["--plot-throughput", str(folder / "throughput.svg")]
            job = "gpt2?layers=2&seq_len=256" if self._asked.quick else "gpt2"
            return [*ours, "probe", job, *options, "--format", "json"], folder / "throughput.json"
        suffix = "json" if part == "peers" else "json.gz"
        out = folder / f"{part}.{suffix}"
        command = [python, str(HERE / f"{part}.py"), str(out), "--seconds", f"{seconds:.0f}", *quick]
        before = self._asked.resume / out.name if self._asked.resume else out
        if part in {"fidelity", "workspaces"} and before.exists():
            command += ["--resume", str(before)]
        return command, None

    def _start_emulated(self) -> None:
        measured = self.folder / "fidelity.json.gz"
        missing = _missing_for("emulated")
        if missing or not measured.exists():
            why = f"it needs {missing}" if missing else "there is no recording to run again"
            self._note(PartEnded(part="emulated", state="left out", detail=why))
            return
        card = self._asked.emulate or _card_of(self.folder) or "H200"
        command = [sys.executable, str(HERE / "emulated.py"), str(self.folder), "--card", card]
        command += ["--seconds", f"{max(20.0, self._deadline - time.monotonic() - 10):.0f}"]
        self._background = Running("emulated", command, self.folder / "emulated.log", nice=19)


def pack(folder: Path, bundle: Path) -> None:
    """Pack a folder's files into one, aside first, so that what is there is whole."""
    aside = bundle.with_name(f".{bundle.name}.{os.getpid()}")
    with tarfile.open(aside, "w:gz") as packed:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path not in {aside, bundle} and not path.name.startswith("."):
                packed.add(path, path.name)
    aside.replace(bundle)


def _missing_for(part: str) -> str:
    """Packages that a part needs and that are not here, as pip knows them."""
    wanted = {**_NEEDED, **{module: package for module, (package, of) in _OPTIONAL.items() if of == part}}
    return ", ".join(package for module, package in wanted.items() if importlib.util.find_spec(module) is None)


def _card_of(folder: Path) -> str | None:
    """The card of a recording, as NVML names it."""
    return read_recording(folder / "fidelity.json.gz").get("machine", {}).get("card")


def main() -> int:
    """Run the parts; 0 where all that ran was done, 1 where a part failed, 69 where there is no card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu-results"))
    parser.add_argument("--seconds", type=float, default=545.0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on from an earlier run's recordings")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="pack everything into this .tar.gz after each part")
    parser.add_argument("--quick", action="store_true", help="little of each, to see that it runs")
    parser.add_argument("--emulate", metavar="CARD", help="a rehearsal on an emulated card")
    asked = parser.parse_args()
    asked.folder = asked.folder.resolve()
    asked.bundle = asked.bundle and asked.bundle.resolve()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.emulate and not os.environ.get("AUTOBATCH_EMULATED_GPU"):
        os.environ["AUTOBATCH_REHEARSAL"] = "1"
        again = [sys.executable, "-m", "autobatch", "emulate", asked.emulate, "--", sys.executable, *sys.argv]
        return subprocess.run(again, check=False).returncode
    if missing := _missing_for("every part"):
        say(f"this needs {missing}: pip install {missing.replace(',', '')}, or name another Python by PYTHON=")
        return 69
    from autobatch import find_presence

    presence = find_presence()
    if not presence.usable:
        say(f"no NVIDIA GPU can be used here: {presence.problem}; --emulate CARD rehearses without one")
        return 69
    end_in_order()
    session = Session(asked)
    session.run(asked.only)
    say(f"recorded in {asked.folder}")
    return int(any(one.state == "failed" for one in session.ended))


if __name__ == "__main__":
    sys.exit(main())
