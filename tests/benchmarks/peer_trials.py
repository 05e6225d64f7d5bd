"""What the comparison runs on one card: started on it, it reads requests from standard input and answers on standard output.

Each request is run in a fork of its own that has not touched CUDA: the card is as it was when the fork ends. Imports, which
are the same for all, are done once, before.

    {"job": NAME, "find": FINDER}                  -> {"answer", "sizes", "steps", "ooms", "seconds", "error"}
    {"job": NAME, "train": SIZE, "steps": STEPS}   -> {"survives", "flushes", "error", "seconds"}

`limit_bytes` beside them lets either have only so much of the card, and `within` only so many seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch
from peer_finders import FINDERS, OURS, TARGET, Halves, ours, quiet

from autobatch.workload.loader import WorkloadName, load_factory, make_job

if TYPE_CHECKING:
    from autobatch import TrainingJob

LIMIT_SECONDS = 600.0
OUT_OF_TIME = "took more than"
"""What an error begins with where a request was ended for its time."""
_IMPORTED = (
    "autobatch.child_probe",
    "lightning.pytorch.tuner",
    "transformers",
    "timm",
    "timm.utils.decay_batch",
    "accelerate.utils",
    "toma",
    "batch_probe",
    "ludwig.utils.batch_size_tuner",
    "composer",
    "ultralytics.utils.autobatch",
)


def find(request: dict[str, Any]) -> dict[str, Any]:
    """Let a finder find."""
    if request["find"] in OURS:
        began = time.perf_counter()
        found = ours(OURS[request["find"]], request["job"], request.get("limit_bytes"))
        return {**found, "seconds": time.perf_counter() - began, "error": ""}
    name = WorkloadName.parse(request["job"])
    made = make_job(name, load_factory(name))
    stand_in(request.get("limit_bytes"), made)
    job = Halves(made)
    finder, error, answer = request["find"], "", None
    began = time.perf_counter()
    try:
        with quiet():
            answer = FINDERS[finder][1](job)
    except BaseException as raised:  # noqa: BLE001 - a finder that fails is a row of the table
        error = f"{type(raised).__name__}: {str(raised).strip().splitlines()[0] if str(raised).strip() else ''}"
    seconds = time.perf_counter() - began
    return {
        "answer": answer,
        "sizes": job.sizes,
        "steps": job.num_steps,
        "ooms": job.num_ooms,
        "seconds": seconds,
        "error": error,
    }


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Train with micro-batches of a size, accumulating to the target, for so many optimizer steps."""
    name = WorkloadName.parse(request["job"])
    job = make_job(name, load_factory(name))
    stand_in(request.get("limit_bytes"), job)
    began = time.perf_counter()
    (optimizer,) = job.optimizers()
    whole, rest = divmod(TARGET, request["train"])
    sizes = [request["train"]] * whole + [rest] * bool(rest)
    flushes = 0
    for step in range(request["steps"]):
        try:
            for size in sizes:
                job.micro_step(size)
            optimizer.step()
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". GPU ")[0]
            return {
                "survives": False,
                "step": step,
                "flushes": 0,
                "error": reason,
                "seconds": time.perf_counter() - began,
            }
        optimizer.zero_grad()
        if step == 1:
            flushes = -_flushes()
    torch.cuda.synchronize()
    return {"survives": True, "flushes": flushes + _flushes(), "error": "", "seconds": time.perf_counter() - began}


def stand_in(limit_bytes: int | None, job: TrainingJob) -> None:
    """Let this process have no more of the card than a smaller one would have, with its context and the kernels that it loads."""
    if limit_bytes is None:
        return
    job.micro_step(1)
    for optimizer in job.optimizers():
        optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(0)
    outside = total - free - torch.cuda.memory_reserved(0)  # nobody else is on the card
    torch.cuda.set_per_process_memory_fraction((limit_bytes - outside) / total, 0)


def _flushes() -> int:
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


def in_a_fork(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request in a fork; one that dies or takes too long says so."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            answer = find(request) if "find" in request else train(request)
        except BaseException as error:  # noqa: BLE001 - whatever ends it is told
            answer = _failed(f"{type(error).__name__}: {error}".splitlines()[0])
        with os.fdopen(write_end, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)
    os.close(write_end)
    limit_seconds = min(LIMIT_SECONDS, request.get("within", LIMIT_SECONDS))
    deadline = time.monotonic() + limit_seconds
    pieces = []
    with contextlib.closing(os.fdopen(read_end, "rb", buffering=0)) as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                break
            piece = pipe.read(65536)
            if not piece:
                break
            pieces.append(piece)
    _, status = os.waitpid(child, 0)
    if not pieces:
        why = f"ended by itself with status {os.waitstatus_to_exitcode(status)}"
        if time.monotonic() >= deadline:
            why = f"{OUT_OF_TIME} {limit_seconds:.0f} s"
        return _failed(why)
    answer = json.loads(b"".join(pieces))
    return dict(answer)


def _failed(why: str) -> dict[str, Any]:
    """The answer to either request where there is none."""
    return {
        "error": why,
        "answer": None,
        "survives": False,
        "flushes": 0,
        "sizes": [],
        "steps": 0,
        "ooms": 0,
        "seconds": 0.0,
    }


def main() -> None:
    """Serve requests."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints, some packages while they are imported, goes to the log
    missing = []
    for name in _IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a peer that cannot be imported is left out by name
            missing.append(f"{name}: {type(error).__name__}: {error}")
    if torch.cuda.is_initialized():
        raise SystemExit("an import has started CUDA: no fork could use it")
    out.write(json.dumps({"ready": True, "missing": missing}) + "\n")
    for line in sys.stdin:
        out.write(json.dumps(in_a_fork(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
