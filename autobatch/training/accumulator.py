"""One optimizer step on a whole effective batch, in micro-batches that fit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from autobatch.errors import NothingFitsError, UsageError
from autobatch.gpu.oom import FailureKind, classify
from autobatch.training.batches import batch_size, split_batch
from autobatch.training.ranks import Meeting, RankGradients, gradients_of
from autobatch.training.update import Update
from autobatch.training.window import Piece, Window, WindowResult, WindowStart

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autobatch.plan import Plan
    from autobatch.training.update import Scheduler

__all__ = ["Accumulator", "MemoryEvent", "WindowResult"]

_LOG = logging.getLogger(__name__)

LastWindow = Literal["step", "carry", "drop"]
OnOom = Literal["auto", "split", "raise"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class MemoryEvent:
    """An out-of-memory error inside a window, and what was done about it."""

    optimizer_step: int
    """Optimizer steps before the window."""
    failed_size: int
    """Samples of the micro-batch that failed."""
    new_size: int
    """The largest micro-batch from now on."""
    message: str
    """The error's own first line."""


class Accumulator:
    """Accumulates gradients over a plan's micro-batches so that each update is that of the whole effective batch.

    Weights: losses that are means over their samples are weighted nᵢ/N, with `count` cᵢ/C, N and C over the whole window and all
    ranks; sums are left alone. Where a wrapper averages gradients over ranks, its division is part of the weight. What a window
    really held decides, also for the last one of an epoch.

    Windows: unscaling, clipping, the optimizers, the scheduler and zeroing come once for each window.

    Out of memory: the window's gradients are dropped, buffers and random generators put back, and the same samples run again in
    smaller micro-batches; the smaller size is kept. An error inside `optimizer.step()` is raised, since parameters may be half
    updated.

    Example:
        >>> import torch, autobatch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> plan = autobatch.make_plan(target=8, max_micro_batch_size=3, split="balanced")
        >>> accumulator = autobatch.Accumulator(plan, model=model, optimizer=optimizer)
        >>> x, y = torch.ones(8, 2), torch.zeros(8, 1)
        >>> result = accumulator.step((x, y), lambda batch: ((model(batch[0]) - batch[1]) ** 2).mean())
        >>> result.micro_batch_sizes, accumulator.optimizer_steps
        ((3, 3, 2), 1)
    """

    def __init__(  # noqa: PLR0913 - a training loop has these parts, each named where it is given
        self,
        plan: Plan,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scheduler: Scheduler | Sequence[Scheduler] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
        loss_reduction: Reduction = "mean",
        count: Callable[[Any], float | torch.Tensor] | None = None,
        last_window: LastWindow = "step",
        on_oom: OnOom = "auto",
        on_event: Callable[[MemoryEvent], object] | None = None,
        split: Callable[[Any, Sequence[int]], Sequence[Any]] = split_batch,
        size: Callable[[Any], int] = batch_size,
    ) -> None:
        """Take the training's parts; nothing is changed yet.

        Args:
            plan: what `probe` or `make_plan` gave.
            model: the model that trains, as it is called: wrapped in DDP or by FSDP2 where it is.
            optimizer: what steps at the end of a window, or several.
            scheduler: a learning-rate scheduler, or several, stepped once after each optimizer step that was not skipped;
                `ReduceLROnPlateau` is stepped by `step_plateau(metric)` instead.
            scaler: the GradScaler; losses are scaled here, not by the caller.
            max_grad_norm: norm to which gradients are clipped once a window, above 0.
            loss_reduction: whether the loss is a `mean` over what it counts, or a `sum`.
            count: what a mean counts in a micro-batch, such as labels that are not ignored; samples where None. It must add
                up over a batch's pieces; count on the host where that is possible, since the number is waited for.
            last_window: what `finish` does with an incomplete window: `step` it by what it holds, `carry` it into the next
                epoch, or `drop` it, buffers and random generators put back.
            on_oom: `split` does a window again in smaller micro-batches, for which its batches are kept until its end; `raise`
                does not; `auto` splits unless other ranks would have to agree (DDP, FSDP).
            on_event: told of each out-of-memory error that was recovered from.
            split, size: how a batch is cut and counted, where it is not of tensors that share their first dimension.

        Raises:
            UsageError: a part is not as it should be, or the ranks are not as many as the plan's.
        """
        _check_parts(plan, model)
        self._plan = plan
        self._update = Update(optimizer, scheduler, scaler, max_grad_norm)
        self._update.check_trains(model)
        self._reduction, self._count = loss_reduction, count
        self._last_window, self._on_event = last_window, on_event
        self._split, self._size = split, size
        self._ranks: RankGradients = gradients_of(model)
        self._check(plan, on_oom)
        self._retries = on_oom == "split" or (on_oom == "auto" and self._ranks.can_retry)
        self._start = WindowStart(model)
        self._limit = plan.micro_batch_size
        self._planned = _sizes_of_rank(plan, self._ranks)
        self._share = max(map(sum, plan.rank_micro_batch_sizes or (plan.micro_batch_sizes,)))
        self._open: Window | None = None
        self.optimizer_steps = 0
        self.skipped_steps = 0
        self.samples_seen = 0

    def _check(self, plan: Plan, on_oom: OnOom) -> None:
        for name, value, allowed in (
            ("loss_reduction", self._reduction, get_args(Reduction)),
            ("last_window", self._last_window, get_args(LastWindow)),
            ("on_oom", on_oom, get_args(OnOom)),
        ):
            if value not in allowed:
                raise UsageError(f"{name} {value!r} is unknown; choose {', '.join(allowed)}")
        if self._count is not None and self._reduction == "sum":
            raise UsageError("count says what a mean counts; a loss that is a sum takes none")
        if self._ranks.averaged_over != plan.world_size:
            ways = f"plan for world_size={self._ranks.averaged_over}"
            if self._ranks.averaged_over == 1:
                ways += ", or give the model as DistributedDataParallel or fully_shard wrapped it"
            raise UsageError(
                f"the model's gradients are averaged over {self._ranks.averaged_over} rank(s), the plan is for world_size "
                f"{plan.world_size}: {ways}"
            )
        if on_oom == "split" and not self._ranks.can_retry:
            raise UsageError(
                "on_oom='split' needs every rank to agree that a window is done again, which DDP and FSDP cannot once a backward "
                "failed: take on_oom='raise', and plan with more headroom"
            )

    # ---- what a training loop calls ---------------------------------------------------------------------------------

    @property
    def at_boundary(self) -> bool:
        """True where no gradients are held: the place to evaluate and to save."""
        return self._open is None

    @property
    def micro_batch_size(self) -> int:
        """The largest micro-batch that runs: the plan's, or less after an out-of-memory error."""
        return self._limit

    def step(self, batch: Any, loss_fn: Callable[[Any], torch.Tensor]) -> WindowResult:
        """Train on one whole effective batch of this rank.

        Args:
            batch: all samples that this rank has in the window; the plan's share, or fewer at the end of an epoch.
            loss_fn: called with a micro-batch; returns its loss, a scalar with a graph, not scaled and not divided.

        Returns:
            What the step came to.

        Raises:
            UsageError: the batch is empty or larger than the plan's share, or a window of single micro-batches is open.
            NothingFitsError: a sample does not fit alone.
        """
        if self._open is not None:
            raise UsageError("a window is open: end it by finish() before a whole batch is stepped")
        samples = self._size(batch)
        if not 1 <= samples <= self._share:
            raise UsageError(
                f"the batch has {samples} samples, the plan's share of a rank is {self._share}: give 1 to {self._share}"
            )
        window = self._begin()
        try:
            # Known before the first backward: every weight is exact from the start.
            pieces = self._cut(batch, samples)
            counted = sum(piece.counted for piece in pieces)
            met = self._meet(Meeting(counted=counted, begins=1, barren=self._is_barren(pieces[-1].counted)))
            window.expected = met.counted
            self._ranks.check_same(len(pieces))
            self._run(window, batch, pieces, loss_fn, last=not met.barren)
            return self._close(window, late=met.barren > 0)
        except BaseException:
            self._abandon(window)
            raise

    def add(self, micro_batch: Any, loss_fn: Callable[[Any], torch.Tensor]) -> WindowResult | None:
        """Train on one micro-batch, and step with the last of a window.

        Under FSDP2 each runs when the next comes, or at `finish`: gradients are sharded by the backward of the last, and
        which that is shows only then.

        Args:
            micro_batch: the next one, as `PlanBatchSampler` gives them.
            loss_fn: as for `step`.

        Returns:
            What the step came to, with the last micro-batch of a window; None before it.

        Raises:
            UsageError: the micro-batch is empty or larger than the plan's.
            NothingFitsError: a sample does not fit alone.
        """
        samples = self._size(micro_batch)
        if not 1 <= samples <= self._plan.micro_batch_size:
            raise UsageError(
                f"the micro-batch has {samples} samples, the plan's have 1 to {self._plan.micro_batch_size}"
            )
        window = self._open or self._begin()
        try:
            if not window.given:
                window.expected = self._estimate(micro_batch, samples)
            else:
                self._check_held(window)
            window.given += 1
            last, late = window.given == self._plan.accumulation_steps, False
            if self._ranks.holds_whole:
                if last:
                    counted = self._counted(micro_batch, samples)
                    met = self._meet(Meeting(counted=window.counted + counted, barren=self._is_barren(counted)))
                    self._weigh_exactly(window, met.counted)
                    late = met.barren > 0
                self._run(window, micro_batch, self._cut(micro_batch, samples), loss_fn, last=last and not late)
            else:
                self._run_waiting(window, last=False)
                window.waiting = (micro_batch, samples, loss_fn)
                if last:
                    self._run_waiting(window, last=True)
                    self._weigh_exactly(window, self._meet(Meeting(counted=window.counted)).counted)
            return self._close(window, late=late) if last else None
        except BaseException:
            self._abandon(window)
            raise

    def _check_held(self, window: Window) -> None:
        # FSDP2 keeps them elsewhere until the last backward.
        if self._ranks.holds_whole and window.counted and not self._update.holds_gradients():
            raise UsageError("gradients were cleared inside of a window: take zero_grad() out of the loop")

    def _run_waiting(self, window: Window, *, last: bool) -> None:
        """Run the micro-batch that was held back, since nobody knew whether it is the window's last."""
        if window.waiting is not None:
            batch, samples, loss_fn = window.waiting
            window.waiting = None
            self._run(window, batch, self._cut(batch, samples), loss_fn, last=last)

    def finish(self) -> WindowResult | None:
        """End an epoch: an incomplete window is stepped, carried or dropped, as `last_window` says.

        Every rank calls it. Where ranks hold different parts of the window, they step together by what each holds.

        Returns:
            What the step came to; None where nothing was held, or it was carried or dropped.

        Raises:
            UsageError: ranks have different numbers of windows, or under FSDP2 of micro-batches.
        """
        result = None
        while True:
            held = self._open
            mine = Meeting(barren=1, finished=1)
            if held is not None:
                mine = dataclasses.replace(mine, counted=held.counted, given=held.given)
            met = self._meet(mine)
            everyone = met.finished == self._ranks.averaged_over
            if self._last_window != "step":
                if held is not None and self._last_window == "drop":
                    self._abandon(held)
                return None
            if not (everyone and not met.given):
                result = self._step_late(met.counted)
            if everyone:
                return result

    def _step_late(self, total: float) -> WindowResult:
        """Step an incomplete window without a last backward that would bring gradients together."""
        window = self._open or self._begin()
        try:
            if not self._ranks.holds_whole:
                self._ranks.check_same(window.given)
                self._run_waiting(window, last=True)
                total = self._ranks.meet(Meeting(counted=window.counted)).counted
            self._weigh_exactly(window, total)
            return self._close(window, late=True)
        except BaseException:
            self._abandon(window)
            raise

    def _meet(self, mine: Meeting) -> Meeting:
        """Meet the other ranks, none of which may have ended its epoch where another begins a window."""
        met = self._ranks.meet(mine)
        elsewhere = met.begins if self._last_window == "step" else self._ranks.averaged_over - met.finished
        if met.finished and elsewhere:
            raise UsageError(
                "a rank has come to the end of its epoch, and another has not: give every rank as many windows, as "
                "PlanBatchSampler(rank=...) does"
            )
        return met

    def _is_barren(self, counted: float) -> float:
        """1 where a last micro-batch has no backward: a mean over nothing is not a number, and would make gradients so."""
        return float(self._reduction == "mean" and not counted and self._ranks.holds_whole)

    def step_plateau(self, metric: float | torch.Tensor) -> None:
        """Step a `ReduceLROnPlateau` with its metric, at a boundary.

        Raises:
            UsageError: gradients are held, or the scheduler is of another kind.
        """
        if not self.at_boundary:
            raise UsageError("gradients are held: evaluate and step the plateau where at_boundary is true")
        self._update.step_plateaus(metric)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly, besides the model's, the optimizers' and the scheduler's own state.

        Raises:
            UsageError: gradients are held.
        """
        if not self.at_boundary:
            raise UsageError("gradients are held: save where at_boundary is true")
        # The plan's own size is not saved: a run resumed under a larger plan is not held to the earlier one's.
        reduced = self._limit if self._limit < self._plan.micro_batch_size else 0
        return {name: getattr(self, name) for name in _COUNTERS} | {_REDUCED: reduced}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            UsageError: it is not such a state, or gradients are held.
        """
        wanted = {*_COUNTERS, _REDUCED}
        if set(state) != wanted or any(type(value) is not int or value < 0 for value in state.values()):
            raise UsageError(
                f"the state has {', '.join(map(str, state)) or 'nothing'}; whole numbers for {', '.join(sorted(wanted))} are "
                "wanted, as state_dict() gives them"
            )
        if not self.at_boundary:
            raise UsageError("gradients are held: load at a boundary, before the first window")
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self._limit = min(state[_REDUCED] or self._plan.micro_batch_size, self._plan.micro_batch_size)

    # ---- a window ---------------------------------------------------------------------------------------------------

    def _begin(self) -> Window:
        if self._update.holds_gradients():
            self._update.zero()  # what an evaluation or another loop left must not be counted in
        self._update.is_accumulating = True
        self._start.keep()
        self._open = Window(expected=float(self._plan.effective_batch_size))
        return self._open

    def _run(self, window: Window, batch: Any, pieces: Sequence[Piece], loss_fn: _LossFn, *, last: bool) -> None:
        """Run what came newly; after an out-of-memory error all of the window again, in smaller micro-batches."""
        if self._retries:
            window.retain(batch)
        while (failure := self._attempt(window, pieces, loss_fn, last=last)) is not None:
            # Outside of the except clause: its frames held the tensors that are to be freed.
            self._shrink(window, failure)
            pieces = [piece for kept in window.retained() for piece in self._cut(kept, self._size(kept))]

    def _attempt(self, window: Window, pieces: Sequence[Piece], loss_fn: _LossFn, *, last: bool) -> _Failure | None:
        for position, piece in enumerate(pieces, start=1):
            try:
                self._forward_backward(window, piece, loss_fn, last=last and position == len(pieces))
            except Exception as error:
                if not self._retries or not _is_memory(error):
                    raise
                return _Failure(size=piece.samples, first=window.samples, message=str(error).partition("\n")[0])
        return None

    def _forward_backward(self, window: Window, piece: Piece, loss_fn: _LossFn, *, last: bool) -> None:
        with self._ranks.backward_of(last=last):
            loss = loss_fn(piece.batch)
            # A mean over nothing is not a number, and would make gradients so. FSDP2's ranks wait for each backward all the same.
            if self._reduction == "sum" or piece.counted or not self._ranks.holds_whole:
                _check_loss(loss)
                weighted = loss * self._weight(piece.counted, window.expected)
                self._update.scaled(weighted).backward()
        window.add(loss.detach(), piece, is_mean=self._reduction == "mean")

    def _weight(self, counted: float, expected: float) -> float:
        """What a micro-batch's loss counts for, the division by the ranks that a wrapper makes undone."""
        if self._reduction == "sum":
            return float(self._ranks.averaged_over)
        return counted * self._ranks.averaged_over / expected if expected else 0.0

    def _counted(self, batch: Any, samples: int) -> float:
        return float(samples) if self._count is None else float(self._count(batch))

    def _estimate(self, first: Any, samples: int) -> float:
        """What a window is taken to count until all of it is known, by its first micro-batch.

        It only keeps the gradients near their final size: what was really held mends them at the end.
        """
        whole = float(self._plan.effective_batch_size)
        expected = whole if self._count is None else self._counted(first, samples) / samples * whole
        # All ranks need the same: under FSDP2 gradients meet before they are mended.
        met = self._meet(Meeting(counted=expected, begins=1))
        return met.counted / self._ranks.averaged_over or whole

    def _cut(self, batch: Any, samples: int) -> list[Piece]:
        sizes = self._sizes(samples)
        parts = self._split(
            batch, sizes
        )  # of one part too: a loss function that pops from its batch leaves the caller's alone
        return [
            Piece(batch=part, samples=size, counted=self._counted(part, size))
            for part, size in zip(parts, sizes, strict=True)
        ]

    def _sizes(self, samples: int) -> tuple[int, ...]:
        """Sizes as the plan has them where they fit still and the window is whole, else as equal as can be."""
        if samples == sum(self._planned) and self._limit >= max(self._planned):
            return self._planned
        steps = -(-samples // self._limit)
        size, larger = divmod(samples, steps)
        return (size + 1,) * larger + (size,) * (steps - larger)

    def _shrink(self, window: Window, failure: _Failure) -> None:
        """Put everything back to the window's start, and go on with smaller micro-batches."""
        if window.has_changed_inputs():
            raise UsageError(
                f"out of memory at micro-batch {failure.size}, and loss_fn changed its batch in place, so that the window cannot "
                f"run again: let it copy what it changes, or take on_oom='raise' ({failure.message})"
            )
        self._put_back(window)
        _release_memory()
        if failure.size == 1:
            raise NothingFitsError(
                f"sample {failure.first} of the window after {self.optimizer_steps} optimizer steps does not fit alone: "
                f"{failure.message}"
            )
        self._limit = (failure.size + 1) // 2
        event = MemoryEvent(
            optimizer_step=self.optimizer_steps, failed_size=failure.size, new_size=self._limit, message=failure.message
        )
        _LOG.warning(
            "out of memory at micro-batch %d after %d optimizer steps: the window runs again with %d",
            event.failed_size,
            event.optimizer_step,
            event.new_size,
        )
        if self._on_event is not None:
            self._on_event(event)

    def _put_back(self, window: Window) -> None:
        window.reset()
        self._update.zero()
        self._start.put_back()

    def _abandon(self, window: Window) -> None:
        """Leave a window as if it had not begun; one that was closed stays as it is."""
        if self._open is window:
            self._open = None
            self._update.is_accumulating = False
            self._put_back(window)
            self._ranks.forget()

    # ---- the end of a window ----------------------------------------------------------------------------------------

    def _close(self, window: Window, *, late: bool) -> WindowResult:
        if late:
            self._ranks.meet_late()
        self._start.end()
        norm = self._update.clip()
        # From here on nothing is undone: an error inside optimizer.step() may leave parameters half updated.
        self._open = None
        stepped = self._update.step()
        self.samples_seen += window.samples
        if stepped:
            self.optimizer_steps += 1
        else:
            self.skipped_steps += 1
        return window.result(norm, stepped=stepped, is_mean=self._reduction == "mean")

    def _weigh_exactly(self, window: Window, total: float) -> None:
        """Weigh what ran by what the window really counts over all ranks, and what comes by the same."""
        import torch

        if self._reduction == "mean" and total and total != window.expected:
            gradients = self._update.gradients()
            if gradients:
                torch._foreach_mul_(gradients, window.expected / total)
            window.expected = total


_COUNTERS = ("optimizer_steps", "skipped_steps", "samples_seen")
_REDUCED = "reduced_micro_batch_size"
_LossFn = Callable[[Any], "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """A micro-batch that ran out of memory."""

    size: int
    first: int
    message: str


def _sizes_of_rank(plan: Plan, ranks: RankGradients) -> tuple[int, ...]:
    if plan.rank_micro_batch_sizes is None:
        return plan.micro_batch_sizes
    return plan.rank_micro_batch_sizes[ranks.rank if ranks.averaged_over > 1 else 0]


def _is_memory(error: BaseException) -> bool:
    verdict = classify(error, device_nearly_full=False, smaller_size_ran=False)
    return verdict.kind is FailureKind.MEMORY and not verdict.context_lost


def _check_parts(plan: object, model: object) -> None:
    from torch import nn

    from autobatch.plan import Plan

    for name, value, kind in (("plan", plan, Plan), ("model", model, nn.Module)):
        if not isinstance(value, kind):
            raise UsageError(f"{name} is of type {type(value).__name__}: give a {kind.__name__}")


def _check_loss(loss: object) -> None:
    import torch

    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UsageError(
            f"loss_fn returned {what}: return the micro-batch's loss, one number with its graph (no .item(), no backward())"
        )


def _release_memory() -> None:
    """Give back what the failed micro-batch left in the allocator's cache, in pieces too small for the next."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
