"""One rank of several on the CPU: each argument is something to do together, and what came of it is written to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from fakes import MIB, ScriptedMemory, scripted_device
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import autobatch
from autobatch.snapshot import state_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch.gpu.opening import OpenDevice
    from autobatch.options import ProbeOptions

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
BUDGETS = (1000, 700, 900)  # MiB, of which the context takes 100


class Middle(nn.Module):
    """A layer that takes memory for the batch in its forward, or once its gradient comes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.in_forward: Callable[[], object] | None = None
        self.in_backward: Callable[[], object] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_forward is not None:
            self.in_forward()
        y: torch.Tensor = self.linear(x)
        if self.in_backward is not None:
            use = self.in_backward
            y.register_hook(lambda gradient: use() and gradient)
        return y


class Job:
    """Three layers, wrapped, that take 1 MiB a sample, when and where the test says."""

    def __init__(self, memory: ScriptedMemory, wrapper: str = "ddp", where: str = "forward") -> None:
        torch.manual_seed(0)
        self.memory, self.where, self.middle = memory, where, Middle()
        plain = nn.Sequential(nn.Linear(4, 4), self.middle, nn.Linear(4, 4))
        self.model: nn.Module = plain
        if wrapper == "ddp":
            self.model = nn.parallel.DistributedDataParallel(plain, bucket_cap_mb=1e-5)
        else:
            mesh = init_device_mesh("cpu", (world,))
            for layer in plain:
                fully_shard(layer, mesh=mesh)
            self.model = fully_shard(plain, mesh=mesh)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)

    def micro_step(self, n: int) -> None:
        setattr(self.middle, f"in_{self.where}", lambda: self.memory.use(n * MIB))
        self.model(torch.ones(2, 4) * (rank + 1)).sum().backward()

    def train(self) -> None:
        self.middle.in_forward = self.middle.in_backward = None
        for number in range(3):
            self.model(torch.ones(2, 4) * (rank + number)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def whole_weights(self) -> list[float]:
        full = [getattr(value, "full_tensor", lambda value=value: value)() for value in self.model.parameters()]
        return [float(value.detach().double().sum()) for value in full]


def probe(job: Job, memory: ScriptedMemory, *, basis: str = "measured", uuid: str = "", **options: Any) -> Any:
    """A probe of this rank, on a device whose memory is the script's; its report, or what it raised."""

    @contextlib.contextmanager
    def scripted(_: ProbeOptions) -> Iterator[OpenDevice]:
        device = scripted_device(memory)
        described = dataclasses.replace(device.facts.device, uuid=uuid or f"GPU-{rank}")
        yield dataclasses.replace(device, facts=dataclasses.replace(device.facts, device=described, basis=basis))

    autobatch.gpu.opening.open_device = scripted  # type: ignore[attr-defined]
    asked = {"target": 3072, "restore": [job.model], "micro_step": job.micro_step, "trial_timeout": 60, **options}
    try:
        report = autobatch.probe(optimizer=job.optimizer, **asked)
    except autobatch.AutobatchError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return json.loads(report.to_json())


def fresh() -> ScriptedMemory:
    return ScriptedMemory(budget_bytes=BUDGETS[rank] * MIB)


def agree(wrapper: str, where: str) -> Any:
    """The whole of it: a probe whose trials fail on one rank in the middle of a pass, and training before and after."""
    memory = fresh()
    job, twin = Job(memory, wrapper, where), Job(memory, wrapper, where)
    for each in (job, twin):
        each.train()
    before = state_hash([job.model, job.optimizer])
    report = probe(job, memory)
    unchanged = state_hash([job.model, job.optimizer]) == before
    for each in (job, twin):
        each.train()
    return {"report": report, "unchanged": unchanged, "trains_on": job.whole_weights() == twin.whole_weights()}


def own_sizes(where: str) -> Any:
    """Each rank its own size, of a target that needs several steps."""
    memory = fresh()
    return probe(Job(memory, "ddp", where), memory, split="balanced", rank_sizes="own", target=5001)


def compiled() -> Any:
    """A compiled model stands around the one that is named, and passes on what it has."""
    memory = fresh()
    job = Job(memory, "fsdp2")
    kept = torch.compile(job.model)
    answer = probe(job, memory)
    del kept
    return answer


def unnamed(wrapper: str) -> Any:
    """The model inside of the wrapper is named, and the wrapper is not."""
    memory = fresh()
    job = Job(memory, wrapper)
    return probe(job, memory, restore=[job.middle.linear] if wrapper == "ddp" else [])


def swallows() -> Any:
    """A job that catches whatever its pass raises and goes on."""
    memory = fresh()
    job = Job(memory)
    step = job.micro_step

    def swallowing(n: int) -> None:
        with contextlib.suppress(RuntimeError):
            step(n)

    return probe(job, memory, micro_step=swallowing)


def differs(name: str, **values: tuple[Any, ...]) -> Any:
    memory = fresh()
    return probe(Job(memory), memory, **{key: value[rank] for key, value in values.items()})


def breaks() -> Any:
    """Rank 1's job fails for a reason of its own, at its second trial."""
    memory = fresh()
    job = Job(memory)
    step = job.micro_step

    def failing(n: int) -> None:
        if rank == 1 and memory.begun == 2:
            raise KeyError("no such column")
        step(n)

    return probe(job, memory, micro_step=failing)


def one_more() -> Any:
    """Rank 1 calls a collective that the others do not."""
    memory = fresh()
    job = Job(memory)
    step = job.micro_step
    calls = 0

    def more(n: int) -> None:
        nonlocal calls
        step(n)
        calls += 1
        if rank == 1 and calls == 6:
            dist.all_reduce(torch.ones(1))

    return probe(job, memory, micro_step=more)


def vanishes(how: str) -> Any:
    """Rank 1 dies, or never comes back, in its first trial."""
    memory = fresh()
    job = Job(memory)
    step = job.micro_step

    def leaving(n: int) -> None:
        step(n)
        if rank == 1 and how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            time.sleep(600)

    began = time.monotonic()
    answer = probe(job, memory, micro_step=leaving, trial_timeout=3 if how == "hangs" else 60)
    return {**answer, "seconds": time.monotonic() - began}


def never_comes() -> Any:
    """Rank 1 does not call the probe."""
    memory = fresh()
    job = Job(memory)
    if rank == 1:
        time.sleep(600)
    return probe(job, memory, trial_timeout=2)


def late() -> Any:
    """The clock of one rank alone says that the time is over."""
    memory = fresh()
    job = Job(memory)
    step = job.micro_step

    def slow(n: int) -> None:
        step(n)
        if rank == 1:
            time.sleep(0.05)

    return probe(job, memory, micro_step=slow, deadline=0.2)


SCENES: dict[str, Callable[[], Any]] = {
    **{
        f"{wrapper}-{where}": lambda wrapper=wrapper, where=where: agree(wrapper, where)
        for wrapper in ("ddp", "fsdp2")
        for where in ("forward", "backward")
    },
    "own": lambda: own_sizes("forward"),
    "own-backward": lambda: own_sizes("backward"),
    "own-even": lambda: differs("own-even", rank_sizes=("own",) * 3),
    "own-fastest": lambda: differs(
        "own-fastest", rank_sizes=("own",) * 3, split=("balanced",) * 3, objective=("throughput",) * 3
    ),
    "own-in-one": lambda: differs("own-in-one", rank_sizes=("own",) * 3, split=("balanced",) * 3, world_size=(1, 1, 1)),
    "own-of-one": lambda: differs("own-of-one", rank_sizes=("same", "own", "same"), split=("balanced",) * 3),
    "compiled-fsdp2": compiled,
    "unnamed-ddp": lambda: unnamed("ddp"),
    "unnamed-fsdp2": lambda: unnamed("fsdp2"),
    "swallows": swallows,
    "target": lambda: differs("target", target=(3072, 3072, 96)),
    "workload": lambda: differs("workload", workload=("a", "b", "a")),
    "mixed": lambda: differs("mixed", basis=("measured", "emulated", "measured")),
    "same-card": lambda: differs("same-card", uuid=("GPU-x", "GPU-y", "GPU-x")),
    "world": lambda: differs("world", world_size=(2, 2, 2)),
    "cache": lambda: differs("cache", cache=("confirm",) * 3),
    "malformed": lambda: differs("malformed", headroom=(0, 0, "much")),
    "breaks": breaks,
    "one-more": one_more,
    "late": late,
    "dies": lambda: vanishes("dies"),
    "hangs": lambda: vanishes("hangs"),
    "never": never_comes,
}

dist.init_process_group("gloo")
answers: dict[str, Any] = {}
folder, *scenes = sys.argv[1:]
for scene in scenes:
    answers[scene] = SCENES[scene]()
    Path(folder, f"{rank}.json").write_text(json.dumps(answers))
sys.stdout.flush()
os._exit(0)
