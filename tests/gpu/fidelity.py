"""Record what training takes of a card, and the same on an emulated one, to hold the two side by side.

    python tests/gpu/fidelity.py OUT.json.gz [--seconds S] [--resume FILE] [--quick]

For each workload, precision and setting of the allocator, in a process of its own: what lies outside the allocator before and
after the first step; eight sizes on the whole card; each event of the allocator in one window of two sizes; and under caps that
stand in for smaller cards the largest size, with every trial that led to it. A trial is the probe's own: three windows of two
micro-batches with their optimizer steps.

It ends within `--seconds`: what is not reached is listed, and `--resume` goes on from there, cap by cap. emulated.py has the same
trials run again in the same order on an emulated card, where its own search for the largest size then goes on from them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from recordings import GIB, end_in_order, machine_facts, read_recording, say, write_recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from autobatch import TrainingJob, Trial

WORKLOADS = ("gpt2", "resnet50", "vit")
MORE = ("hf:gpt2?task=causal-lm&seq_len=512", "hf:bert?task=masked-lm&seq_len=512", "timm:convnext_tiny")
"""Models of libraries, after all the others: they need transformers and timm."""
ALLOCATORS = {"default": "", "expandable_segments": "expandable_segments:True"}
PRECISIONS = ("bf16", "fp32")
CAPS: tuple[int | None, ...] = (16, None, 40, 24, 80)
"""In GiB, in the order in which they are recorded; None is the card as it is."""
QUICK = ("gpt2?seq_len=512&layers=2&width=256&heads=4&vocab=8192", "resnet50?image=64")
COLUMNS = (
    "micro_batch_size",
    "outcome",
    "steps",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "footprint_bytes",
    "alloc_retries",
    "held_bytes",
    "gradient_bytes",
    "largest_segment_bytes",
    "oom_request_bytes",
    "seconds_per_step",
)
_CURVE_BYTES = 20 * GIB
_CURVE_SIZES = 8
_LONGEST_END = 10.0
"""Seconds that a process may take beyond its time: the trial that runs then is let end."""
_LEAST_SECONDS = 12.0
"""No process is begun with fewer left: CUDA would hardly have started."""
_FAIR_SECONDS = 28.0
"""What each process gets at least, as long as there is so much: a few that are whole tell more than many that are not."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one process records."""

    workload: str
    precision: str
    allocator: str

    @property
    def name(self) -> str:
        return f"{self.workload}, {self.precision}, {self.allocator}"

    @property
    def job(self) -> str:
        """The workload's name with the precision in it."""
        return f"{self.workload}{'&' if '?' in self.workload else '?'}precision={self.precision}"


def settings(*, quick: bool) -> list[Setting]:
    """All of them, what tells most first."""
    groups = [QUICK] if quick else [WORKLOADS, MORE]
    precisions = PRECISIONS[:1] if quick else PRECISIONS
    return [
        Setting(workload=workload, precision=precision, allocator=allocator)
        for group in groups
        for allocator in ALLOCATORS
        for precision in precisions
        for workload in group
    ]


# ---- in the process of one setting ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OpenCard:
    """The card under a cap."""

    run: Callable[[int], Trial]
    """Runs a trial of a size."""
    budget_bytes: int
    memory: Mapping[str, int | None]
    """What others hold, and what lies outside the allocator before the first trial."""


class Recorder:
    """Records one setting in this process.

    Args:
        setting: what to record.
        deadline: when to end, by the monotonic clock.
        like: the sizes to try, where a recording is run again.
        have: the rows of a curve that an earlier process recorded; then only caps are left.
        emit: is given each part as it is done.
    """

    def __init__(
        self,
        setting: Setting,
        deadline: float,
        *,
        like: Mapping[str, Any],
        have: Sequence[Sequence[Any]],
        emit: Callable[..., None],
    ) -> None:
        from autobatch.workload.loader import WorkloadName, load_factory

        self._name = WorkloadName.parse(setting.job)
        self._factory = load_factory(self._name)
        self._deadline, self._like, self._emit = deadline, like, emit
        trials = [dict(zip(COLUMNS, row, strict=True)) for row in have]
        self._known: list[Any] = [SimpleNamespace(**one) for one in trials if one["outcome"] == "fits"]
        self._longest = 0.0
        self.is_timed = not os.environ.get("AUTOBATCH_EMULATED_GPU")

    def record(self, caps: Sequence[int | None]) -> None:
        """Record everything, each part as it is done, until time is up."""
        if not self._known:
            self._emit(context=self._context())
            self._emit(machine=machine_facts())
            self._emit(curve=self._curve())
            self._emit(traces=self._traces())
        for cap in caps:
            if self._is_late():
                return
            self._emit(cap=self._under(cap))

    def _job(self) -> TrainingJob:
        from autobatch.workload.loader import make_job

        return make_job(self._name, self._factory)

    def _is_late(self) -> bool:
        return time.monotonic() + self._longest > self._deadline

    def _context(self) -> list[dict[str, Any]]:
        """What NVML, CUDA and the allocator say, from before CUDA starts to after the second optimizer step."""
        import torch

        from autobatch.gpu.nvml import NvmlSession

        def read(moment: str) -> None:
            memory = device.memory()
            found = {
                "moment": moment,
                "nvml_free_bytes": memory.free_bytes,
                "nvml_own_bytes": device.process_bytes(os.getpid()),
            }
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                found |= {
                    "cuda_free_bytes": torch.cuda.mem_get_info(0)[0],
                    "reserved_bytes": torch.cuda.memory_reserved(0),
                    "allocated_bytes": torch.cuda.memory_allocated(0),
                }
            readings.append(found)

        readings: list[dict[str, Any]] = []
        with NvmlSession() as session:
            device = session.device(0)
            read("before CUDA")
            torch.cuda.init()
            torch.cuda.mem_get_info(0)  # makes the context
            read("context")
            job = self._job()
            read("model and optimizer")
            for step in ("first", "second"):
                job.micro_step(1)
                read(f"{step} micro-batch")
                _end_window(job)
                read(f"{step} optimizer step")
        return readings

    @contextlib.contextmanager
    def _opened(self, cap: int | None) -> Iterator[OpenCard]:
        from autobatch.gpu.opening import open_device
        from autobatch.options import ProbeOptions
        from autobatch.workload.running import TrialRunner

        limit = None if cap is None else f"{cap}GiB"
        with open_device(ProbeOptions(target=1, headroom=0, memory_limit=limit)) as device:
            runner = TrialRunner(self._job, device.memory, timed=self.is_timed)

            def run(size: int) -> Trial:
                began = time.monotonic()
                trial = runner((size, size))
                self._longest = max(self._longest, time.monotonic() - began)
                return trial

            memory = device.facts.memory
            yield OpenCard(
                run=run,
                budget_bytes=memory.budget_bytes,
                memory={"tenants_bytes": memory.other_tenants_bytes, "context_bytes": memory.context_bytes},
            )

    def _curve(self) -> dict[str, Any]:
        """Eight sizes without a cap, up to about 20 GiB or half the card."""
        with self._opened(None) as card:
            most = min(_CURVE_BYTES, card.budget_bytes // 2)
            trials = [card.run(size) for size in self._like.get("sizes") or (1, 2)]
            while not self._like and len(trials) < _CURVE_SIZES and not self._is_late():
                this = trials[-1].micro_batch_size
                wanted = _size_for(trials, most * (len(trials) - 1) // (_CURVE_SIZES - 2))
                trials.append(card.run(max(this + 1, min(4 * this, wanted))))
        self._known = [trial for trial in trials if trial.fits]
        return {"rows": [_row(trial) for trial in trials], "memory": card.memory}

    def _traces(self) -> list[dict[str, Any]]:
        """The allocator's events in a third window, of two of the sizes."""
        known = [trial.micro_batch_size for trial in self._known]
        sizes = self._like.get("traced") or sorted({known[len(known) // 4], known[len(known) // 2]})
        return [{"micro_batch_size": size, "events": self._trace(size)} for size in sizes]

    def _trace(self, size: int) -> list[list[Any]]:
        import torch

        torch.cuda.empty_cache()
        job = self._job()
        for last in (False, False, True):
            if last:
                torch.cuda.synchronize()
                torch._C._cuda_clearCublasWorkspaces()  # asked for anew, and seen
                torch.cuda.memory._record_memory_history("all", context=None, stacks="python", clear_history=True)
            job.micro_step(size)
            job.micro_step(size)
            _end_window(job)
        torch.cuda.synchronize()
        events = torch.cuda.memory._snapshot()["device_traces"][0]
        torch.cuda.memory._record_memory_history(None)
        # A block is freed twice, when its last use is asked for and when it is over: the second is what counts.
        return [[event["action"], event["size"]] for event in events if event["action"] != "free_requested"]

    def _under(self, cap: int | None) -> dict[str, Any]:
        """The largest size under a cap, with every trial that led to it; where one fails otherwise, what it said."""
        from autobatch.errors import AutobatchError, WorkloadError
        from autobatch.search import SearchSpace, find_bracket, next_size

        trials: list[Trial] = []
        size: int | None = 0
        problem = ""
        with self._opened(cap) as card:
            try:
                trials.extend(card.run(known) for known in self._like.get("caps", {}).get(_label(cap), ()))
                candidates = range(1, 1 << 16)
                first = None
                if not trials and len(self._known) > 1:
                    first = min(candidates[-1], _size_for(self._known, card.budget_bytes))
                space = SearchSpace(candidates=candidates, budget_bytes=card.budget_bytes, share=1 << 20, first=first)
                while (size := next_size(trials, space)) is not None and not self._is_late():
                    trials.append(card.run(size))
            except AutobatchError as error:
                if isinstance(error, WorkloadError) and error.context_lost:
                    raise
                problem = str(error)
        return {
            "cap": _label(cap),
            "budget_bytes": card.budget_bytes,
            "memory": card.memory,
            "rows": [_row(trial) for trial in trials],
            "largest": find_bracket(trials).fits if size is None else None,
            "is_certified": size is None,
            "problem": problem,
        }


def _size_for(trials: Sequence[Trial], footprint_bytes: int) -> int:
    """The size that would have about this footprint, by the line through the two trials nearest to it."""
    pairs = list(itertools.pairwise(trials))
    before, last = next((pair for pair in pairs if pair[1].footprint_bytes >= footprint_bytes), pairs[-1])
    # Tensors rather than segments: of small sizes several share one.
    grown = max(1, last.peak_allocated_bytes - before.peak_allocated_bytes)
    per_sample = grown / max(1, last.micro_batch_size - before.micro_batch_size)
    return max(1, int(last.micro_batch_size + (footprint_bytes - last.footprint_bytes) / per_sample))


def _end_window(job: TrainingJob) -> None:
    for optimizer in job.optimizers():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _row(trial: Trial) -> list[Any]:
    return [getattr(trial, column) for column in COLUMNS]


def _label(cap: int | None) -> str:
    return "none" if cap is None else f"{cap} GiB"


def child(setting: Setting) -> None:
    """Record one setting: wait for the word, then a line of JSON for each part that is done."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(**part: Any) -> None:
        out.write(json.dumps(part) + "\n")

    import torch  # noqa: F401 - the long part, done before it is this process's turn

    import autobatch.workload.running  # noqa: F401

    emit(ready=True)
    asked = json.loads(sys.stdin.readline() or "null")
    if asked is None:
        return
    deadline = time.monotonic() + asked["seconds"]
    recorder = Recorder(setting, deadline, like=asked["like"], have=asked["have"], emit=emit)
    recorder.record([cap if cap is None else int(cap) for cap in asked["caps"]])


# ---- the process that asks -----------------------------------------------------------------------


class Process:
    """A process that records one setting; it imports while another one's turn lasts."""

    def __init__(self, setting: Setting, emulate: str | None) -> None:
        self.setting = setting
        command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(setting))]
        if emulate:
            command = [sys.executable, "-m", "autobatch", "emulate", emulate, "--", *command]
        variables = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
        if ALLOCATORS[setting.allocator]:
            variables["PYTORCH_CUDA_ALLOC_CONF"] = ALLOCATORS[setting.allocator]
        self._process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process.poll() is None:
            self.end()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def end(self) -> None:
        """End it and what it started: on an emulated card the process itself is one that started another."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(3)
                return

    def record(self, **asked: Any) -> dict[str, Any]:
        """Have it record, and collect what it says; a part that is missing was not reached, or says why."""
        found: dict[str, Any] = {**dataclasses.asdict(self.setting), "caps": [], "problem": ""}
        began = time.monotonic()
        try:
            output, errors = self._process.communicate(
                json.dumps(asked) + "\n", timeout=asked["seconds"] + _LONGEST_END
            )
        except subprocess.TimeoutExpired:
            self.end()
            output, errors = self._process.communicate()
            errors += f"\nended after {time.monotonic() - began:.0f} s"
        for line in output.splitlines():
            with contextlib.suppress(ValueError):  # the last one, where it was ended while it wrote
                part = json.loads(line)
                if "cap" in part:
                    found["caps"].append(part["cap"])
                else:
                    found |= part
        found.pop("ready", None)
        found["seconds"] = round(time.monotonic() - began, 1)
        if self._process.returncode != 0:
            found["problem"] = (errors.strip().splitlines() or ["it gave no reason"])[-1]
        return found


def likeness(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a recording tried, in its order."""
    return {
        "sizes": [row[0] for row in recorded.get("curve", {}).get("rows", ())],
        "traced": [trace["micro_batch_size"] for trace in recorded.get("traces", ())],
        "caps": {one["cap"]: [row[0] for row in one["rows"]] for one in recorded["caps"]},
    }


def is_done(recorded: Mapping[str, Any], caps: Sequence[int | None]) -> bool:
    """Whether nothing of a setting is left to record."""
    certified = {one["cap"] for one in recorded["caps"] if one["is_certified"]}
    return {_label(cap) for cap in caps} <= certified


class Recording:
    """The file as it grows: after each setting it is whole, and says what is missing."""

    def __init__(
        self, path: Path, content: dict[str, Any], wanted: Sequence[Setting], caps: Sequence[int | None]
    ) -> None:
        self._path, self.content, self._wanted, self._caps = path, content, wanted, caps

    def of(self, setting: Setting) -> dict[str, Any]:
        """What there is of a setting."""
        wanted = {**dataclasses.asdict(setting), "caps": [], "problem": ""}
        return next((one for one in self.content["settings"] if _key(one) == _key(wanted)), wanted)

    def add(self, found: dict[str, Any]) -> None:
        """Keep what one process recorded, beside what there is of its setting already."""
        facts = found.pop("machine", None)
        if facts:
            self.content["machine"] = facts
        settings = self.content["settings"]
        before = next((one for one in settings if _key(one) == _key(found)), {"caps": []})
        caps = {one["cap"]: one for one in before["caps"]}
        for one in found["caps"]:
            if one["is_certified"] or not caps.get(one["cap"], {}).get("is_certified"):
                caps[one["cap"]] = one
        whole = {**before, **found, "caps": list(caps.values())}
        self.content["settings"] = [*(one for one in settings if _key(one) != _key(found)), whole]
        self.write()
        shown = ", ".join(f"{one['cap']}: {one['largest'] or '–'}" for one in found["caps"])
        say(f"  {', '.join(_key(found))}: {shown or 'no cap'} {found['problem']}")

    def write(self) -> None:
        """Write it with what is missing of it."""
        self.content["missing"] = missing(self.content, self._wanted, self._caps)
        write_recording(self._path, self.content)


def _key(recorded: Mapping[str, Any]) -> tuple[str, str, str]:
    return recorded["workload"], recorded["precision"], recorded["allocator"]


def record(wanted: Sequence[Setting], recording: Recording, *, seconds: float, caps: Sequence[int | None]) -> None:
    """Record on the card, one setting after the other; the next process imports meanwhile."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        turn = stack.enter_context(Process(wanted[0], None)) if wanted else None
        for place, after in enumerate([*wanted[1:], None]):
            left = deadline - time.monotonic()
            if turn is None or left < _LEAST_SECONDS:
                break
            next_turn = stack.enter_context(Process(after, None)) if after else None
            # What others do not need is there for this one.
            share = max(_FAIR_SECONDS, 1.5 * left / (len(wanted) - place))
            known = recording.of(turn.setting)
            certified = {one["cap"] for one in known["caps"] if one["is_certified"]}
            have = known["curve"]["rows"] if "traces" in known else []
            asked = {"like": {}, "have": have, "caps": [cap for cap in caps if _label(cap) not in certified]}
            recording.add(turn.record(seconds=min(left, share), **asked))
            turn = next_turn


def emulate(measured: Mapping[str, Any], recording: Recording, *, card: str, seconds: float, workers: int) -> None:
    """Run what was recorded again on an emulated card; each setting is a process, several at once."""
    deadline = time.monotonic() + seconds

    def run(one: Mapping[str, Any]) -> dict[str, Any] | None:
        setting = Setting(workload=one["workload"], precision=one["precision"], allocator=one["allocator"])
        left = deadline - time.monotonic()
        if left < _LEAST_SECONDS:
            return None
        labels = [found["cap"] for found in one["caps"]]
        with Process(setting, card) as process:
            running.append(process)
            caps = [None if label == "none" else int(label.split()[0]) for label in labels]
            return process.record(seconds=left, like=likeness(one), have=[], caps=caps)

    done = [one for one in measured["settings"] if "curve" in one]
    running: list[Process] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for found in pool.map(run, done):
                if found is not None:
                    recording.add(found)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.end()
            raise


def missing(content: Mapping[str, Any], wanted: Sequence[Setting], caps: Sequence[int | None]) -> list[str]:
    """What was not reached, or failed."""
    known = {_key(one): one for one in content["settings"]}
    lines = []
    for setting in wanted:
        one = known.get(_key(dataclasses.asdict(setting)))
        if one is None:
            lines.append(f"{setting.name}: not reached")
        elif not is_done(one, caps):
            certified = {each["cap"] for each in one["caps"] if each["is_certified"]}
            left = [_label(cap) for cap in caps if _label(cap) not in certified]
            why = f" ({one['problem']})" if one["problem"] else ""
            lines.append(f"{setting.name}: {', '.join(left)} not reached{why}")
    return lines


def main() -> int:
    """Record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what is done there, and go on from it")
    parser.add_argument("--quick", action="store_true", help="two small workloads, two caps")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(Setting(**json.loads(asked.child)))
        return 0
    if asked.out is None:
        parser.error("name the file to write")
    end_in_order()
    kept = read_recording(asked.resume) if asked.resume else {"columns": COLUMNS, "settings": []}
    caps = (1, 2) if asked.quick else CAPS
    wanted = settings(quick=asked.quick)
    recording = Recording(asked.out, kept, wanted, caps)
    left = [one for one in wanted if not is_done(recording.of(one), caps)]
    record(left, recording, seconds=asked.seconds, caps=caps)
    recording.write()
    for line in recording.content["missing"]:
        say(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
