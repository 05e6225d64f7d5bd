"""What makes accumulation differ from the whole batch: found by changing one thing and running again."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.training.samples import tensors_of
from autobatch.training.twin import Edits, relative_difference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from autobatch.training.twin import Count, Twins

__all__ = ["Cause", "find_causes"]


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One thing that makes the accumulated gradient differ from the whole batch's."""

    name: str
    """`batch statistics`, `buffers`, `token mean`, `sum`, `mean`, `in-batch loss`, `uncounted mean`, `stochastic`, `unknown`."""
    why: str
    """What was seen."""
    way_out: str
    """What would make them equal, or what to do where nothing can."""


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """A way in which the loss may count."""

    count: Count
    text: str


def find_causes(
    twins: Twins, batch: Any, difference: float, *, tolerance: float, reduction: str, has_count: bool
) -> tuple[Cause, ...]:
    """Find the fewest changes under which both are equal; where there are none, see whether samples depend on each other.

    Every change that is tried is tried on both sides, whole and split, from the same parameters and seeds. At most 2³ × 15 pairs
    of runs, only where a difference was found.
    """
    changes = _changes(twins)
    counts = _counts(batch) if reduction == "mean" or has_count else []
    weights: list[_Counted | str | None] = [None, "sum" if reduction == "mean" else "mean", *counts]
    tries = [
        (len(chosen) + (weight is not None), chosen, weight)
        for size in range(len(changes) + 1)
        for chosen in itertools.combinations(changes, size)
        for weight in weights
    ]
    tries.sort(key=lambda one: one[0])
    wholes: dict[tuple[str, ...], Mapping[str, torch.Tensor]] = {}
    for number, chosen, weight in tries:
        if not number:
            continue
        edits = _edits(chosen, weight)
        if chosen not in wholes:
            wholes[chosen] = twins.whole(edits)
        left, _ = relative_difference(twins.split(edits), wholes[chosen])
        if left <= tolerance:
            said = f"the difference falls from {difference:.1e} to {left:.1e}"
            return tuple(_change_cause(name, twins, said) for name in chosen) + tuple(_weight_cause(weight, left))
    return _residue(twins, _edits(tuple(changes), None), changes, tolerance)


def _changes(twins: Twins) -> list[str]:
    changes = []
    if twins.changed_buffers:
        changes.append("kept_buffers")
    if twins.statistics_modules():
        changes.append("frozen_statistics")
    if twins.noise is not None and twins.noise.unheld:
        changes.append("without_noise")
    return changes


def _edits(chosen: tuple[str, ...], weight: _Counted | str | None) -> Edits:
    switches: dict[str, Any] = dict.fromkeys(chosen, True)
    if isinstance(weight, _Counted):
        return Edits(**switches, count=weight.count, reduction="mean")
    return Edits(**switches, reduction=weight)  # type: ignore[arg-type]  # one of the two names


def _counts(batch: Any) -> Iterator[_Counted] | list[_Counted]:
    """Ways to count what a mean may be over: entries of a whole-number tensor that are not ignored, shifted by one or not."""
    import torch

    found = []
    for text, keys, tensor in tensors_of(batch):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dim() < 1:
            continue
        ignored = -100 if tensor.dtype is not torch.bool and bool((tensor == -100).any()) else 0
        for part, cut in (("", 0), ("[:, 1:]", 1)) if tensor.dim() > 1 else (("", 0),):
            found.append(
                _Counted(count=_counter(keys, ignored, cut), text=f"lambda batch: ({text}{part} != {ignored}).sum()")
            )
    return found[:12]


def _counter(keys: tuple[object, ...], ignored: int, cut: int) -> Count:
    def count(batch: Any) -> float:
        value = batch
        for key in keys:
            value = value[key]
        return float((value[:, cut:] != ignored).sum() if cut else (value != ignored).sum())

    return count


def _change_cause(name: str, twins: Twins, said: str) -> Cause:
    if name == "frozen_statistics":
        return _statistics_cause(twins, said)
    if name == "kept_buffers":
        return Cause(
            name="buffers",
            why=f"the forward reads buffers that it changes ({', '.join(twins.changed_buffers[:3])}); put back before each "
            f"micro-batch, {said}",
            way_out="change such buffers once a window, after the optimizer step",
        )
    operators = ", ".join(sorted(twins.noise.unheld)) if twins.noise is not None else ""
    return Cause(
        name="stochastic",
        why=f"random draws ({operators}) that cannot be held for each sample; in eval mode {said}",
        way_out="check the model with dropout and noise off; a random difference of this kind is no error of accumulation",
    )


def _statistics_cause(twins: Twins, said: str) -> Cause:
    modules = twins.statistics_modules()
    named = ", ".join(f"{key or 'the model'} ({type(module).__name__})" for key, module in list(modules.items())[:3])
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    return Cause(
        name="batch statistics",
        why=f"{named}{more} normalize by what a micro-batch holds; with running statistics instead, {said}",
        way_out="put these modules in eval mode, or take GroupNorm or LayerNorm; otherwise they see the micro-batch size, "
        "which is part of the training then",
    )


def _weight_cause(weight: _Counted | str | None, left: float) -> Iterator[Cause]:
    if isinstance(weight, _Counted):
        yield Cause(
            name="token mean",
            why="the loss is a mean over what micro-batches hold unequally many of; weighted by that count, whole and split "
            f"differ by {left:.1e}",
            way_out=f"pass count={weight.text}",
        )
    elif weight == "sum":
        yield Cause(
            name="sum",
            why=f"the loss is a sum over samples; left unweighted, micro-batches differ from the whole by {left:.1e}",
            way_out='pass loss_reduction="sum", or let the loss be a mean',
        )
    elif weight == "mean":
        yield Cause(
            name="mean",
            why=f"the loss is a mean over samples; weighted by them, micro-batches differ from the whole by {left:.1e}",
            way_out='pass loss_reduction="mean"',
        )


# ---- where no change helps ------------------------------------------------------------------------------------------


def _residue(twins: Twins, edits: Edits, changes: list[str], tolerance: float) -> tuple[Cause, ...]:
    """See how the loss of two halves together follows from theirs alone: as a weighted mean, or not at all."""
    half = twins.samples // 2
    first, second = list(range(half)), list(range(half, twins.samples))
    together = _vector(twins.whole(edits), twins.loss)
    ours = _vector(twins.whole(edits, rows=first), twins.loss)
    other = _vector(twins.whole(edits, rows=second), twins.loss)
    across = ours - other
    share = float((together - other) @ across) / (float(across @ across) or 1.0)
    left = float((together - other - share * across).norm()) / (float(together.norm()) or 1.0)
    also = " (batch statistics and changing buffers were ruled out)" if changes else ""
    if left <= max(tolerance, 1e-9) and 0 <= share <= 1:
        return (
            Cause(
                name="uncounted mean",
                why=f"the loss of the batch weighs its first {half} samples by {share:.4f}, where their number says "
                f"{half / twins.samples:.4f}: it is a mean over something that is not counted",
                way_out="pass count=, a function of a micro-batch that gives what the loss divides by",
            ),
        )
    found: tuple[Cause, ...] = ()
    if twins.statistics_modules():
        found = (_statistics_cause(twins, "another difference remains, named beside this"),)
    changed = _replaced(twins, edits)
    if changed > tolerance:
        return (
            *found,
            Cause(
                name="in-batch loss",
                why=f"a sample's loss depends on the others of its batch: of the gradient of all, {left:.1e} is no weighted mean "
                f"of its halves' gradients, and what a sample adds to it changes by {changed:.1e} with the others{also}",
                way_out="accumulation gives each sample fewer others: take the micro-batch as the batch that the loss means, "
                "or cache embeddings and their gradients over the whole window",
            ),
        )
    return (
        *found,
        Cause(
            name="unknown",
            why=f"whole and split differ, and nothing that was changed removed it{also}",
            way_out="check parts of the model alone, or with fewer samples",
        ),
    )


def _replaced(twins: Twins, edits: Edits) -> float:
    """How much the exchange of one sample for another changes with the samples that stand by it.

    S(a, X) − S(b, X) − S(a, Y) + S(b, Y), which is 0 where each sample has a loss of its own: S is the batch's gradient times its
    samples, a and b are one sample each, X and Y the halves of the others (or, of 2 or
    3 samples, a and b themselves).
    """
    rest = list(range(2, twins.samples))
    middle = max(1, len(rest) // 2)
    sides = (rest[:middle] or [0], rest[middle:] or [1])
    size = min(map(len, sides))
    sums = {
        (one, side): _vector(twins.whole(edits, rows=[one, *sides[side][:size]]), twins.loss)
        for one in (0, 1)
        for side in (0, 1)
    }
    mixed = sums[0, 0] - sums[1, 0] - sums[0, 1] + sums[1, 1]
    return float(mixed.norm()) / (float(sums[0, 0].norm()) or 1.0)


def _vector(gradients: Mapping[str, torch.Tensor], loss: float) -> torch.Tensor:
    import torch

    parts = [gradient.flatten().double() for gradient in gradients.values()]
    return torch.cat([*parts, parts[0].new_tensor([loss])])
