"""A window that ran out of memory is done again in smaller micro-batches, as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autobatch import NothingFitsError, UsageError, make_plan
from autobatch.training.accumulator import Accumulator, MemoryEvent

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *_grads: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(MESSAGE)


class Run:
    """A model with batch norm and dropout; calls with more than `fits` samples fail from call `fails_from` on."""

    def __init__(
        self, *, largest: int = 4, fits: int = 99, fails_from: int = 0, where: str = "forward", **more: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
        self.fits, self.fails_from, self.where, self.calls = fits, fails_from, where, 0
        self.error: BaseException = torch.OutOfMemoryError(MESSAGE)
        self.events: list[MemoryEvent] = []
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.accumulator = Accumulator(
            make_plan(target=8, max_micro_batch_size=largest),
            model=self.model,
            optimizer=self.optimizer,
            on_event=self.events.append,
            **more,
        )

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        value: torch.Tensor = self.model(x).square().mean()
        if len(x) <= self.fits or self.calls <= self.fails_from:
            return value
        if self.where == "backward":
            return _FailsBackward.apply(value)  # type: ignore[no-any-return]
        raise self.error

    def train(self, *, streamed: bool = False, windows: int = 2) -> dict[str, torch.Tensor]:
        """Everything that training left: weights, buffers and the generator's state."""
        torch.manual_seed(7)
        for batch in torch.randn(8 * windows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).split(
            8
        ):
            if streamed:
                for piece in batch.split(4):
                    self.accumulator.add(piece, self.loss)
            else:
                self.accumulator.step(batch, self.loss)
        return {**self.model.state_dict(), "generator": torch.get_rng_state()}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("fails_from", [0, 1])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_disturbed_run_is_the_run_with_the_smaller_size(where: str, fails_from: int, streamed: bool) -> None:
    """Failed in the first or the last micro-batch: weights, batch-norm statistics and dropout's generator are bit-equal."""
    undisturbed = Run(largest=2).train()
    run = Run(fits=2, fails_from=fails_from, where=where)
    assert all(map(torch.equal, undisturbed.values(), run.train(streamed=streamed).values()))
    assert run.events == [MemoryEvent(optimizer_step=0, failed_size=4, new_size=2, message=MESSAGE)]
    assert (run.accumulator.optimizer_steps, run.accumulator.samples_seen) == (2, 16)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_in_a_later_window_goes_on_from_there(streamed: bool) -> None:
    """What trainers that start anew get wrong: no earlier step runs again, and the effective batch stays what it was."""
    run = Run(fits=2, fails_from=2)
    run.train(streamed=streamed, windows=3)
    assert [event.optimizer_step for event in run.events] == [1]
    # two fours, a failed one, then two windows in twos
    assert run.calls == 2 + 1 + 4 + 4
    assert (run.accumulator.optimizer_steps, run.accumulator.samples_seen) == (3, 24)
    assert all(state["step"] == 3 for state in run.optimizer.state.values())


def test_the_smaller_size_is_kept_and_saved() -> None:
    """By the accumulator that met the error, and by one that takes up its state; a run without one saves no limit."""
    run = Run(fits=2)
    run.train()
    resumed = Run(fits=2)
    resumed.accumulator.load_state_dict(run.accumulator.state_dict())
    resumed.train()
    assert (resumed.accumulator.micro_batch_size, resumed.events) == (2, [])
    larger = Run(largest=8)
    larger.accumulator.load_state_dict(Run(largest=2).accumulator.state_dict())
    assert larger.accumulator.micro_batch_size == 8


def test_a_sample_that_does_not_fit_alone_is_named() -> None:
    """Every size is tried down to one; the error names the sample, and nothing is held after it."""
    run = Run(fits=0)
    run.model.eval()  # batch norm takes no single sample
    with pytest.raises(NothingFitsError, match="sample 0 of the window after 0 optimizer steps does not fit alone"):
        run.train()
    assert [event.new_size for event in run.events] == [2, 1]
    assert run.accumulator.at_boundary


@pytest.mark.parametrize("error", [ValueError("a bad sample"), KeyboardInterrupt()])
@pytest.mark.parametrize("streamed", [False, True])
def test_other_exceptions_leave_nothing_behind(error: BaseException, streamed: bool) -> None:
    """No gradient, no open window, buffers as before; and no second try."""
    run = Run(fits=0, fails_from=1)
    run.error = error
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(type(error)):
        run.train(streamed=streamed)
    assert run.accumulator.at_boundary
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert all(map(torch.equal, before.values(), run.model.state_dict().values()))
    assert (run.calls, run.events) == (2, [])


def test_an_error_inside_the_optimizer_is_raised() -> None:
    """Never retried, which could step twice on one batch: the loss was called for two micro-batches; no gradient is left."""
    run = Run()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    run.optimizer.register_step_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    assert (run.calls, run.events, run.accumulator.optimizer_steps) == (2, [], 0)
    assert run.accumulator.at_boundary
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_raise_does_not_split() -> None:
    """`on_oom="raise"` leaves the error to the caller."""
    run = Run(fits=2, on_oom="raise")
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    with pytest.raises(UsageError, match="on_oom 'retry' is unknown"):
        Run(on_oom="retry")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_batch_that_was_changed_in_place_is_not_run_again(streamed: bool) -> None:
    """It would be another batch the second time."""
    run = Run(fits=2)
    loss = run.loss
    run.loss = lambda x: loss(x.mul_(2))  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="changed its batch in place"):
        run.train(streamed=streamed)
    assert run.accumulator.at_boundary


def test_a_loss_function_may_pop_from_its_batch() -> None:
    """Each run of it gets a mapping of its own, also where the batch is one micro-batch."""
    run = Run(fits=2, largest=8)
    loss = run.loss
    x = torch.randn(8, 3, dtype=torch.float64)
    result = run.accumulator.step({"x": x}, lambda batch: loss(batch.pop("x")))
    assert result.micro_batch_sizes == (2, 2, 2, 2)
