"""Two ranks over gloo make the update of one process; gradients meet once a window. This file is the ranks' script too."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from autobatch import Plan, UsageError, make_plan, make_rank_plan
from autobatch.training.accumulator import Accumulator
from autobatch.training.ranks import gradients_of

ROOT = Path(__file__).parents[2]
SAMPLES = 11


def fresh_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def data() -> torch.Tensor:
    return torch.randn(SAMPLES, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def flat(model: nn.Module) -> torch.Tensor:
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    return torch.cat([getattr(value, "full_tensor", lambda value=value: value)().flatten() for value in gradients])


class Rank:
    """One of two ranks, with a wrapped model whose gradients and all-reduces are watched."""

    def __init__(self, wrapped: nn.Module, target: int, plan: Plan | None = None, **more: Any) -> None:
        self.model, self.seen = wrapped, list[torch.Tensor]()
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_: self.seen.append(flat(wrapped)))
        plan = plan or make_plan(target=target, max_micro_batch_size=2, world_size=2, split="balanced")
        self.accumulator = Accumulator(plan, model=wrapped, optimizer=optimizer, **more)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.model(x)
        return value.square().mean()

    def difference(self, samples: torch.Tensor) -> float:
        whole = fresh_model()
        whole(samples).square().mean().backward()
        wanted = flat(whole)
        return float((self.seen[-1] - wanted).norm() / wanted.norm())


def message(call: Any) -> str:
    try:
        call()
    except UsageError as error:
        return str(error)
    return "nothing was raised"


def ddp_figures(rank: int) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(fresh_model())
    reduces = []

    def reduce(_state, bucket):  # type: ignore[no-untyped-def] # torch refuses annotations that are not evaluated
        reduces.append(bucket.index())
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, reduce)
    x = data()
    unequal = Rank(wrapped, SAMPLES)
    unequal.accumulator.step(x[:6] if rank == 0 else x[6:], unequal.loss)
    figures: dict[str, Any] = {"unequal": unequal.difference(x), "buckets": len(reduces)}
    # A rank with three times the room of the other takes 3, 3 and 2 samples beside 1, 1 and 1.
    own = Rank(wrapped, SAMPLES, make_rank_plan(target=SAMPLES, max_micro_batch_sizes=[3, 1]))
    own.accumulator.step(x[:8] if rank == 0 else x[8:], own.loss)
    figures["own_sizes"] = own.difference(x)
    streamed = Rank(wrapped, 8, count=lambda part: len(part) * 5)
    for piece in (x[:4] if rank == 0 else x[4:8]).split(2):
        streamed.accumulator.add(piece, streamed.loss)
    figures["streamed"] = streamed.difference(x[:8])
    # Of a window of three micro-batches rank 0 holds two, and rank 1 one.
    late = Rank(wrapped, 12)
    for piece in (x[:4] if rank == 0 else x[4:6]).split(2):
        late.accumulator.add(piece, late.loss)
    result = late.accumulator.finish()
    figures["late"] = late.difference(x[:6])
    figures["late_samples"] = result.samples if result else None
    figures["nothing_left"] = late.accumulator.finish() is None
    # Rank 1 is at its window's last micro-batch where rank 0 ends with one of two.
    mixed = Rank(wrapped, 8)
    for piece in (x[:2] if rank == 0 else x[2:6]).split(2):
        mixed.accumulator.add(piece, mixed.loss)
    mixed.accumulator.finish()
    figures["mixed"] = mixed.difference(x[:6])
    figures.update(ddp_edges(wrapped, rank, x))
    figures["split_refused"] = message(lambda: Rank(wrapped, 8, on_oom="split"))
    plan = make_plan(target=8, max_micro_batch_size=2)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    figures["mismatch"] = message(lambda: Accumulator(plan, model=wrapped, optimizer=optimizer))
    return figures


def ddp_edges(wrapped: nn.Module, rank: int, x: torch.Tensor) -> dict[str, Any]:
    """Micro-batches in which nothing counts, and ranks whose data end early."""
    figures: dict[str, Any] = {}
    kept = torch.arange(8) % 8 < 5  # the last micro-batch of rank 1 counts nothing

    def loss(part: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        values = wrapped(part[0]).squeeze(-1).square()
        return (values * part[1]).sum() / part[1].sum()

    for name in ("add", "step"):
        masked = Rank(wrapped, 8, count=lambda part: int(part[1].sum()))
        mine = slice(0, 4) if rank == 0 else slice(4, 8)
        if name == "step":
            masked.accumulator.step((x[mine], kept[mine]), loss)
        else:
            for part in zip(x[mine].split(2), kept[mine].split(2), strict=True):
                masked.accumulator.add(part, loss)
        figures[f"masked_{name}"] = masked.difference(x[:5])

    def run(name: str) -> None:
        unequal = Rank(wrapped, 8)
        for start in range(0, 8 if rank == 0 else 4, 4):
            if name == "step":
                unequal.accumulator.step(x[start : start + 4], unequal.loss)
            else:
                for piece in x[start : start + 4].split(2):
                    unequal.accumulator.add(piece, unequal.loss)
        unequal.accumulator.finish()

    for name in ("add", "step"):
        figures[f"early_{name}"] = message(lambda name=name: run(name))
    return figures


def fsdp_figures(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fresh_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    x = data()[:8]
    run = Rank(model, 8)
    run.accumulator.step(x[:4] if rank == 0 else x[4:], run.loss)
    figures: dict[str, Any] = {"whole": run.difference(x)}
    streamed = Rank(model, 8, count=lambda part: len(part) * (5 + rank) / (5 + rank))
    for piece in (x[:4] if rank == 0 else x[4:]).split(2):
        streamed.accumulator.add(piece, streamed.loss)
    figures["streamed"] = streamed.difference(x)
    figures["unequal"] = message(lambda: run.accumulator.step(x[: 4 - 2 * rank], run.loss))
    late = Rank(model, 12)
    for piece in (x[:4] if rank == 0 else x[4:]).split(2):
        late.accumulator.add(piece, late.loss)
    figures["held_back"] = not late.accumulator.at_boundary and not late.seen
    result = late.accumulator.finish()
    figures["late"] = late.difference(x)
    figures["late_samples"] = result.samples if result else None
    # Four micro-batches a window: gradients of three are held where no parameter shows them.
    longer = Rank(model, 8, make_plan(target=8, max_micro_batch_size=1, world_size=2))
    for piece in (x[:4] if rank == 0 else x[4:]).split(1):
        longer.accumulator.add(piece, longer.loss)
    figures["longer"] = longer.difference(x)
    # Left half-way, a window leaves nothing behind for the next.
    dropped = Rank(model, 8, make_plan(target=8, max_micro_batch_size=1, world_size=2), last_window="drop")
    for piece in (x[:3] if rank == 0 else x[3:6]).split(1):
        dropped.accumulator.add(piece, dropped.loss)
    dropped.accumulator.finish()
    for piece in (x[:4] if rank == 0 else x[4:]).split(1):
        dropped.accumulator.add(piece, dropped.loss)
    figures["after_a_dropped_one"] = dropped.difference(x)
    return figures


def drawn_figures(rank: int) -> dict[str, float]:
    """The largest relative difference from the full batch's gradient over drawn sizes, lengths, kinds of loss and splits."""
    from torch.nn.parallel import DistributedDataParallel

    worst = {"float64": 0.0, "float32": 0.0}
    draw = random.Random(0)  # the same on both ranks
    for number in range(40):
        dtype = torch.float64 if number % 2 else torch.float32
        shares = [draw.randint(1, 6), draw.randint(1, 6)]
        lengths = torch.tensor([draw.randint(0, 5) for _ in range(sum(shares))])
        lengths[draw.randrange(len(lengths))] = 5
        kind, largest, streamed = draw.choice(["mean", "sum", "count"]), draw.randint(1, 6), draw.random() < 0.5
        x = torch.randn(len(lengths), 5, 3, dtype=dtype, generator=torch.Generator().manual_seed(number))
        kept = torch.arange(5) < lengths[:, None]

        def loss(model: nn.Module, part: tuple[torch.Tensor, torch.Tensor], kind: str = kind) -> torch.Tensor:
            values = model(part[0]).squeeze(-1).square()
            if kind == "mean":
                return values.mean()
            total = (values * part[1]).sum()
            return total if kind == "sum" else total / part[1].sum()

        whole, model = fresh_model().to(dtype), fresh_model().to(dtype)
        loss(whole, (x, kept)).backward()
        wanted = flat(whole)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
        seen: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(lambda *_, seen=seen, model=model: seen.append(flat(model)))
        run = Accumulator(
            make_plan(target=2 * max(shares), max_micro_batch_size=largest, world_size=2, split="balanced"),
            model=wrapped,
            optimizer=optimizer,
            loss_reduction="sum" if kind == "sum" else "mean",
            count=(lambda part: int(part[1].sum())) if kind == "count" else None,
        )
        mine = slice(0, shares[0]) if rank == 0 else slice(shares[0], None)
        if streamed:
            size = run.micro_batch_size
            for part in zip(x[mine].split(size), kept[mine].split(size), strict=True):
                run.add(part, lambda piece, wrapped=wrapped, loss=loss: loss(wrapped, piece))
            run.finish()
        else:
            run.step((x[mine], kept[mine]), lambda piece, wrapped=wrapped, loss=loss: loss(wrapped, piece))
        if len(seen) != 1:
            raise AssertionError((number, len(seen)))
        name = str(dtype).removeprefix("torch.")
        worst[name] = max(worst[name], float((seen[0] - wanted).norm() / wanted.norm()))
    return worst


def run_rank(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=45)
    )
    figures: dict[str, Any] = {"ddp": ddp_figures(rank), "drawn": drawn_figures(rank)}
    try:
        figures["fsdp"] = fsdp_figures(rank)
    except (RuntimeError, AssertionError, ImportError) as error:
        figures["fsdp"] = {"error": f"{type(error).__name__}: {error}"[:300]}
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    store = tmp_path_factory.mktemp("ranks") / "store"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(store)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, answers, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in answers]


def test_ddp_equals_one_process(ranks: list[dict[str, Any]]) -> None:
    """Six samples on one rank and five on the other; micro-batches one by one with counts of their own; to 1e-12."""
    for rank in ranks:
        assert rank["ddp"]["unequal"] <= 1e-12
        assert rank["ddp"]["own_sizes"] <= 1e-12
        assert rank["ddp"]["streamed"] <= 1e-12


def test_gradients_meet_once_a_window(ranks: list[dict[str, Any]]) -> None:
    """Of three backwards only the last all-reduces: one bucket, once."""
    assert [rank["ddp"]["buckets"] for rank in ranks] == [1, 1]


def test_an_incomplete_window_meets_late(ranks: list[dict[str, Any]]) -> None:
    """Ranks hold different parts of it and step by what each holds; with nothing left none does."""
    assert [rank["ddp"]["late_samples"] for rank in ranks] == [4, 2]
    for rank in ranks:
        assert rank["ddp"]["late"] <= 1e-12
        assert rank["ddp"]["mixed"] <= 1e-12
        assert rank["ddp"]["nothing_left"]


def test_a_last_micro_batch_in_which_nothing_counts(ranks: list[dict[str, Any]]) -> None:
    """Its mean is not a number: it has no backward, and gradients meet without it."""
    for rank in ranks:
        assert rank["ddp"]["masked_add"] <= 1e-12
        assert rank["ddp"]["masked_step"] <= 1e-12


def test_a_rank_whose_data_end_early(ranks: list[dict[str, Any]]) -> None:
    """Told on every rank, rather than waited for for ever."""
    for rank in ranks:
        for name in ("early_add", "early_step"):
            assert "a rank has come to the end of its epoch, and another has not" in rank["ddp"][name]


def test_what_ranks_refuse(ranks: list[dict[str, Any]]) -> None:
    """A retry that the others cannot join, and a plan for another number of ranks."""
    for rank in ranks:
        assert "on_oom='split' needs every rank to agree" in rank["ddp"]["split_refused"]
        assert "averaged over 2 rank(s), the plan is for world_size 1" in rank["ddp"]["mismatch"]


def test_fsdp2_equals_one_process(ranks: list[dict[str, Any]]) -> None:
    """By `step` and by `add`, to 1e-12; unequal numbers of micro-batches are refused on both ranks, not waited for."""
    for rank in ranks:
        assert "error" not in rank["fsdp"], rank["fsdp"]
        assert rank["fsdp"]["whole"] <= 1e-12
        assert rank["fsdp"]["streamed"] <= 1e-12
        assert rank["fsdp"]["longer"] <= 1e-12
        assert rank["fsdp"]["after_a_dropped_one"] <= 1e-12
        assert "1 to 2 micro-batches" in rank["fsdp"]["unequal"]


def test_an_incomplete_window_under_fsdp2(ranks: list[dict[str, Any]]) -> None:
    """The newest micro-batch waits for the next; at the end it brings the gradients together, to 1e-12."""
    for rank in ranks:
        assert "error" not in rank["fsdp"], rank["fsdp"]
        assert rank["fsdp"]["held_back"]
        assert rank["fsdp"]["late"] <= 1e-12
        assert rank["fsdp"]["late_samples"] == 4


def test_drawn_windows_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    """Forty drawn sizes, splits, lengths and kinds of loss: to 1e-12 in float64, and within rounding in float32."""
    for rank in ranks:
        assert rank["drawn"]["float64"] <= 1e-12
        assert 0 < rank["drawn"]["float32"] <= 16 * torch.finfo(torch.float32).eps


def test_wrappers_that_cannot_be_held_back() -> None:
    """`DataParallel` splits by itself; the way out is named."""
    with pytest.raises(UsageError, match="wrap the model in DistributedDataParallel"):
        gradients_of(nn.DataParallel(fresh_model()))


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
