"""An update by the accumulator is that of the whole effective batch, and everything of a window comes once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from autobatch import UsageError, make_plan
from autobatch.training.accumulator import Accumulator

IGNORED, CLASSES, LONGEST = -100, 7, 6


def fresh_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Sequences of these lengths; what lies behind is ignored."""
    generator = torch.Generator().manual_seed(len(lengths))
    labels = torch.randint(CLASSES, (len(lengths), LONGEST), generator=generator)
    for row, length in zip(labels, lengths, strict=True):
        row[length:] = IGNORED
    return {"x": torch.randn(len(lengths), LONGEST, 3, generator=generator, dtype=torch.float64), "labels": labels}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    logits = model(batch["x"])
    if kind == "mean":
        return logits.square().mean()
    reduction = "mean" if kind == "count" else "sum"
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction=reduction)


def tokens(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"] != IGNORED).sum())


def make(model: nn.Module, target: int, largest: int, kind: str = "mean", **more: Any) -> Accumulator:
    more.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    return Accumulator(
        make_plan(target=target, max_micro_batch_size=largest, split="balanced"),
        model=model,
        loss_reduction="sum" if kind == "sum" else "mean",
        count=tokens if kind == "count" else None,
        **more,
    )


def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])
        )
    )
    return seen


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, LONGEST), min_size=1, max_size=12).filter(any),
    missing=st.integers(0, 3),
    largest=st.integers(1, 12),
    kind=st.sampled_from(["mean", "sum", "count"]),
    streamed=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_gradient_is_the_full_batchs(
    lengths: list[int], missing: int, largest: int, kind: str, streamed: bool, dtype: torch.dtype
) -> None:
    """For drawn sizes, splits and lengths, incomplete windows and micro-batches without a label included.

    To 1e-12 in float64, and within rounding in float32: each of a sum's terms is rounded once more than in the full batch.
    """
    tolerance = 1e-12 if dtype is torch.float64 else 16 * torch.finfo(dtype).eps
    batch, whole, model = batch_of(lengths), fresh_model().to(dtype), fresh_model().to(dtype)
    batch["x"] = batch["x"].to(dtype)
    loss_of(whole, batch, kind).backward()
    wanted = torch.cat([value.grad.flatten() for value in whole.parameters() if value.grad is not None])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watch(model, optimizer)
    accumulator = make(model, len(lengths) + missing, largest, kind, optimizer=optimizer)
    if streamed:
        size = accumulator.micro_batch_size
        for start in range(0, len(lengths), size):
            piece = {name: value[start : start + size] for name, value in batch.items()}
            accumulator.add(piece, lambda part: loss_of(model, part, kind))
        accumulator.finish()
    else:
        result = accumulator.step(batch, lambda part: loss_of(model, part, kind))
        assert result.loss.item() == pytest.approx(loss_of(whole, batch, kind).item(), rel=tolerance)
    assert len(seen) == 1
    assert (seen[0] - wanted).norm() <= tolerance * wanted.norm()
    assert accumulator.samples_seen == len(lengths)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_optimizers_see_the_same_updates(kind: str) -> None:
    """Three updates leave the same weights, whatever the optimizer makes of gradients."""
    whole, model = fresh_model(), fresh_model()
    one, other = (getattr(torch.optim, kind)(value.parameters(), lr=0.01) for value in (whole, model))
    accumulator = make(model, 6, 4, optimizer=other)
    for _ in range(3):
        batch = batch_of([1] * 6)
        one.zero_grad()
        loss_of(whole, batch, "mean").backward()
        one.step()
        accumulator.step(batch, lambda part: loss_of(model, part, "mean"))
    for left, right in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)


def test_several_optimizers_and_schedulers() -> None:
    """Each steps once a window with its own rate; one clipping covers the parameters of both."""
    model, whole = fresh_model(), fresh_model()

    def parts(module: nn.Sequential) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        optimizers = [
            torch.optim.SGD(module[0].parameters(), lr=0.1),
            torch.optim.AdamW(module[2].parameters(), lr=0.01),
        ]
        return optimizers, [
            LambdaLR(optimizers[0], lambda step: 1 / (step + 1)),
            LambdaLR(optimizers[1], lambda step: 0.5**step),
        ]

    (ours, our_schedulers), (theirs, their_schedulers) = parts(model), parts(whole)
    accumulator = make(model, 6, 2, optimizer=ours, scheduler=our_schedulers, max_grad_norm=0.05)
    for _ in range(3):
        batch = batch_of([1] * 6)
        accumulator.step(batch, lambda part: loss_of(model, part, "mean"))
        loss_of(whole, batch, "mean").backward()
        nn.utils.clip_grad_norm_(whole.parameters(), 0.05)
        for part in (*theirs, *their_schedulers):
            part.step()
        whole.zero_grad()
    for left, right in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)
    assert [scheduler.get_last_lr() for scheduler in our_schedulers] == [
        pytest.approx([0.025]),
        pytest.approx([0.00125]),
    ]


def test_bfloat16_autocast() -> None:
    """Weights stay float32, and the gradient is the full batch's within bfloat16's rounding of each micro-batch."""
    whole, model = fresh_model().float(), fresh_model().float()
    batch = batch_of([3, 5, 2, 6, 1, 4])
    batch["x"] = batch["x"].float()

    def loss(module: nn.Module, part: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(module, part, "count")

    loss(whole, batch).backward()
    wanted = torch.cat([value.grad.flatten() for value in whole.parameters() if value.grad is not None])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watch(model, optimizer)
    make(model, 6, 2, "count", optimizer=optimizer).step(batch, lambda part: loss(model, part))
    assert seen[0].dtype is torch.float32
    assert 0 < (seen[0] - wanted).norm() <= 4 * torch.finfo(torch.bfloat16).eps * wanted.norm()


def test_a_compiled_model() -> None:
    """Traced for each size of micro-batch, it makes the full batch's gradient too."""
    whole, model = fresh_model(), fresh_model()
    compiled = torch.compile(model, backend="aot_eager")
    batch = batch_of([1] * 5)
    loss_of(whole, batch, "mean").backward()
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    seen = watch(model, optimizer)
    make(compiled, 5, 2, optimizer=optimizer).step(batch, lambda part: loss_of(compiled, part, "mean"))
    wanted = torch.cat([value.grad.flatten() for value in whole.parameters() if value.grad is not None])
    assert (seen[0] - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize(("last_window", "steps", "samples"), [("step", 2, 6), ("carry", 1, 4), ("drop", 1, 4)])
def test_an_incomplete_window(last_window: Any, steps: int, samples: int) -> None:
    """Three micro-batches of two, two a window: the last is stepped, held for the next epoch, or forgotten."""
    model = fresh_model()
    accumulator = make(model, 4, 2, last_window=last_window)
    for piece in (batch_of([1, 1]) for _ in range(3)):
        accumulator.add(piece, lambda part: loss_of(model, part, "mean"))
    accumulator.finish()
    assert (accumulator.optimizer_steps, accumulator.samples_seen) == (steps, samples)
    assert accumulator.at_boundary == (last_window != "carry")
    assert any(value.grad is not None for value in model.parameters()) == (last_window == "carry")
    if last_window == "carry":
        result = accumulator.add(batch_of([1, 1]), lambda part: loss_of(model, part, "mean"))
        assert result is not None
        assert result.samples == 4


def test_clipping_and_zeroing_come_once_a_window() -> None:
    """The norm reported is the whole window's, what is stepped has the norm asked for, and one zeroing ends it."""
    model, whole = fresh_model(), fresh_model()
    batch = batch_of([1] * 6)
    loss_of(whole, batch, "mean").backward()
    norm = torch.nn.utils.get_total_norm([value.grad for value in whole.parameters() if value.grad is not None])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watch(model, optimizer)
    zeroed: list[bool] = []
    zero = optimizer.zero_grad
    optimizer.zero_grad = lambda set_to_none=True: (zeroed.append(set_to_none), zero(set_to_none))[1]  # type: ignore[method-assign]
    accumulator = make(model, 6, 2, optimizer=optimizer, max_grad_norm=1e-3)
    result = accumulator.step(batch, lambda part: loss_of(model, part, "mean"))
    assert result.grad_norm is not None
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)
    assert seen[0].norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert zeroed == [True]


def test_a_skipped_step_is_counted_and_the_schedule_waits() -> None:
    """A GradScaler that skips for infinite gradients: no optimizer step, no scheduler step; the next window has both."""
    model = fresh_model().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accumulator = make(model, 4, 2, optimizer=optimizer, scheduler=scheduler, scaler=scaler, max_grad_norm=1.0)
    x = torch.ones(4, 3)
    skipped = accumulator.step(x, lambda part: model(part).mean() * float("inf"))
    assert (skipped.stepped, accumulator.skipped_steps, accumulator.optimizer_steps) == (False, 1, 0)
    assert (scheduler.get_last_lr(), scaler.get_scale()) == ([1.0], 2.0)
    done = accumulator.step(x, lambda part: model(part).mean())
    assert (done.stepped, accumulator.skipped_steps, accumulator.optimizer_steps) == (True, 1, 1)
    assert scheduler.get_last_lr() == [0.5]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_window_in_which_nothing_counts(scaled: bool) -> None:
    """Makes no step, with and without a GradScaler, and its loss needs no graph; the next window makes one."""
    model = fresh_model().float()
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    accumulator = make(model, 2, 1, "count", scaler=scaler, max_grad_norm=1.0)
    batch = batch_of([0, 0])
    batch["x"] = batch["x"].float()
    assert not accumulator.step(batch, lambda _: torch.tensor(0.0)).stepped
    batch["labels"][0, 0] = 1
    assert accumulator.step(batch, lambda part: loss_of(model, part, "count")).stepped
    assert (accumulator.optimizer_steps, accumulator.skipped_steps) == (1, 1)


@pytest.mark.parametrize("left", ["zero_grad", "step"])
def test_what_is_left_of_a_hand_written_loop(left: str) -> None:
    """Clearing or stepping inside of a window is told; after it, it does no harm."""
    model = fresh_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = make(model, 4, 2, optimizer=optimizer)

    def loop() -> None:
        for _ in range(2):
            accumulator.add(batch_of([1, 1]), lambda part: loss_of(model, part, "mean"))
            getattr(optimizer, left)()

    with pytest.raises(UsageError, match=rf"{left}\(\) out"):
        loop()
    accumulator.finish()
    optimizer.zero_grad()
    accumulator.step(batch_of([1] * 4), lambda part: loss_of(model, part, "mean"))
    getattr(optimizer, left)()


def test_a_boundary_is_only_between_windows() -> None:
    """Within a window, also inside of step(), gradients are held; state is neither saved nor loaded then."""
    model = fresh_model()
    accumulator = make(model, 4, 2)
    inside: list[bool] = []

    def loss(part: dict[str, torch.Tensor]) -> torch.Tensor:
        inside.append(accumulator.at_boundary)
        return loss_of(model, part, "mean")

    state = accumulator.state_dict()
    accumulator.step(batch_of([1] * 4), loss)
    accumulator.add(batch_of([1] * 2), loss)
    assert inside == [False] * 3
    with pytest.raises(UsageError, match="gradients are held: save"):
        accumulator.state_dict()
    with pytest.raises(UsageError, match="gradients are held: load"):
        accumulator.load_state_dict(state)
    with pytest.raises(UsageError, match="a window is open"):
        accumulator.step(batch_of([1] * 4), loss)


def test_a_resumed_run_is_bit_equal() -> None:
    """Saved after two windows and taken up by new objects, the third window leaves the same bits and counters."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any, Accumulator]:
        model = fresh_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return model, optimizer, scheduler, make(model, 5, 2, optimizer=optimizer, scheduler=scheduler)

    def window(parts: tuple[Any, ...]) -> None:
        parts[3].step(batch_of([1] * 5), lambda part: loss_of(parts[0], part, "mean"))

    run = build()
    window(run)
    window(run)
    saved = copy.deepcopy([part.state_dict() for part in run])
    window(run)
    resumed = build()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    window(resumed)
    assert all(map(torch.equal, run[0].state_dict().values(), resumed[0].state_dict().values()))
    assert run[3].state_dict() == resumed[3].state_dict()


@pytest.mark.parametrize("state", [{}, {"optimizer_steps": 1}, {"x": 2}])
def test_a_foreign_state_is_refused(state: dict[str, int]) -> None:
    """Before anything is changed."""
    with pytest.raises(UsageError, match="whole numbers for"):
        make(fresh_model(), 4, 2).load_state_dict(state)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"last_window": "keep"}, "last_window 'keep' is unknown"),
        ({"max_grad_norm": 0.0}, "not above 0"),
        ({"kind": "sum", "count": tokens}, "takes none"),
        ({"optimizer": []}, "no optimizer was given"),
        ({"optimizer": None}, "optimizer is of type NoneType"),
        ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())}, "would train another model"),
        ({"model": None}, "model is of type NoneType"),
        ({"plan": 4}, "plan is of type int"),
    ],
)
def test_wrong_arguments(more: dict[str, Any], message: str) -> None:
    """Told when the accumulator is made."""
    model, kind = fresh_model(), more.pop("kind", "mean")
    with pytest.raises(UsageError, match=message):
        Accumulator(
            more.pop("plan", make_plan(target=4, max_micro_batch_size=2)),
            loss_reduction=kind,
            **{"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **more},
        )


def test_a_parameter_of_two_optimizers() -> None:
    """Stepped twice a window, it would not make the full batch's update."""
    model = fresh_model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model[0].parameters(), lr=0.1)]
    with pytest.raises(UsageError, match="2 parameters belong to two optimizers"):
        make(model, 4, 2, optimizer=optimizers)


def test_a_plan_for_more_ranks_than_the_models() -> None:
    """A model that nothing synchronises, under a plan for two ranks, would train two models."""
    model = fresh_model()
    with pytest.raises(UsageError, match=r"averaged over 1 rank.* world_size 2.*DistributedDataParallel"):
        Accumulator(
            make_plan(target=4, max_micro_batch_size=2, world_size=2),
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )


@pytest.mark.parametrize("returned", [1.0, torch.ones(2, requires_grad=True), torch.tensor(1.0)])
def test_a_loss_without_a_graph_is_refused(returned: Any) -> None:
    """Numbers, vectors and detached losses; the window is closed."""
    accumulator = make(fresh_model(), 4, 2)
    with pytest.raises(UsageError, match="loss_fn returned"):
        accumulator.step(batch_of([1] * 4), lambda _: returned)
    assert accumulator.at_boundary
