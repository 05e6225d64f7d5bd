"""From a target and the largest micro-batch that fits to sizes, steps and weights: pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from autobatch.errors import PlanError, UsageError
from autobatch.units import format_percent, parse_fraction

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LARGEST_LISTING", "LARGEST_TARGET", "SPLITS", "Plan", "Split", "make_plan"]

Split = Literal["even", "balanced"]
SPLITS: tuple[str, ...] = get_args(Split)

LARGEST_TARGET = 1_000_000_000
"""The largest target, in samples, that is taken: it bounds what one question may cost a service."""
LARGEST_LISTING = 1_048_576
"""The most micro-batches that one plan lists, unless less is asked for."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one optimizer step reaches its effective batch size.

    All sizes are samples. The accumulation steps are the same on every rank, because sharded
    training waits for every rank at every backward and would hang otherwise.
    """

    target: int
    """Samples per optimizer step that were asked for, over all ranks, at least 1."""
    world_size: int
    """Data-parallel ranks, at least 1."""
    split: Split
    """`even`: one size everywhere. `balanced`: sizes one `multiple_of` apart, always exact."""
    micro_batch_size: int
    """The largest micro-batch of any rank."""
    accumulation_steps: int
    """Micro-batches per optimizer step on each rank."""
    micro_batch_sizes: tuple[int, ...]
    """The sizes of rank 0's micro-batches in order, largest first."""
    effective_batch_size: int
    """Samples per optimizer step that the plan gives, over all ranks."""
    exact: bool
    """True where `effective_batch_size` is `target`."""
    rank_micro_batch_sizes: tuple[tuple[int, ...], ...] | None = field(default=None, metadata={"omit_none": True})
    """`micro_batch_sizes` of every rank; None where all ranks are equal."""
    warnings: tuple[str, ...] = ()
    """What the reader should know about the plan, one line each."""

    def __post_init__(self) -> None:
        listed = self.rank_micro_batch_sizes is not None
        ranks = (self.micro_batch_sizes,) if self.rank_micro_batch_sizes is None else self.rank_micro_batch_sizes
        factor = 1 if listed else self.world_size
        distinct = set(ranks)
        smallest = min((min(sizes, default=0) for sizes in distinct), default=0)
        if min(self.target, self.world_size, self.accumulation_steps, smallest) < 1:
            raise ValueError("a plan's target, world_size, steps and micro-batches are at least 1")
        if listed and (len(ranks) != self.world_size or ranks[0] != self.micro_batch_sizes):
            raise ValueError(f"{len(ranks)} ranks are listed for world_size {self.world_size}, or rank 0 differs")
        if any(len(sizes) != self.accumulation_steps for sizes in distinct):
            raise ValueError(f"accumulation_steps {self.accumulation_steps} but another number of sizes is listed")
        if self.micro_batch_size != max(map(max, distinct)):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is not the largest size of the plan")
        if self.effective_batch_size != sum(map(sum, ranks)) * factor:
            raise ValueError(f"effective_batch_size {self.effective_batch_size} is not the sum of the sizes")
        if self.exact != (self.effective_batch_size == self.target):
            raise ValueError(f"exact is {self.exact}: {self.effective_batch_size} for target {self.target}")
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r} is none of {', '.join(SPLITS)}")
        if (self.split == "even" and len(self.sizes) > 1) or (self.split == "balanced" and not self.exact):
            raise ValueError(f"no plan under split {self.split}: sizes {self.sizes}, exact {self.exact}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The distinct sizes over all ranks, largest first."""
        ranks = set(self.rank_micro_batch_sizes or (self.micro_batch_sizes,))
        return tuple(sorted({size for sizes in ranks for size in sizes}, reverse=True))

    @property
    def weights(self) -> tuple[float, ...]:
        """What each of rank 0's micro-batches counts for: nᵢ / N, N the effective batch size.

        For losses that are a mean over their micro-batch: Σ over all ranks of wᵢ·lossᵢ is the mean
        loss of the whole batch, and the weights of all ranks sum to 1. Where gradients are averaged
        over ranks (DDP and FSDP do), multiply by `world_size`. A loss that is a mean over something
        else, such as unpadded tokens, needs the counts of that.
        """
        return tuple(size / self.effective_batch_size for size in self.micro_batch_sizes)

    @property
    def confirmation_windows(self) -> tuple[tuple[int, ...], ...]:
        """Every window whose trial is needed: `confirmation_window`, and each size of its own without accumulation."""
        if self.accumulation_steps == 1:
            return tuple((size,) for size in self.sizes)
        return (self.confirmation_window,)

    @property
    def confirmation_window(self) -> tuple[int, ...]:
        """The window whose trial confirms every size of the plan.

        `(n,)` without accumulation, `(n, n)` for one size, and one window of both where two are
        mixed. Gradients are alive from the second micro-batch on, so the larger size comes second
        where any rank runs it after another micro-batch, and first where it only ever opens a window.
        """
        return _confirming(self.rank_micro_batch_sizes or (self.micro_batch_sizes,))

    @property
    def rank_confirmation_windows(self) -> tuple[tuple[int, ...], ...]:
        """For each rank, the window whose trial confirms every size that this rank runs."""
        return tuple(
            _confirming((sizes,))
            for sizes in self.rank_micro_batch_sizes or (self.micro_batch_sizes,) * self.world_size
        )


def _confirming(windows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The window whose trial confirms every size of windows that run alike, as `Plan.confirmation_window` says."""
    sizes = {size for window in windows for size in window}
    large, small = max(sizes), min(sizes)
    if len(windows[0]) == 1:
        return (large,)
    return (small, large) if any(large in window[1:] for window in set(map(tuple, windows))) else (large, small)


@dataclass(frozen=True, kw_only=True)
class _Question:
    """The checked arguments of `make_plan`, counted in units of `multiple_of` samples."""

    target: int
    world_size: int
    multiple_of: int
    max_units: int
    allowed_miss: int
    largest_effective: int
    most_listed: int

    @property
    def unit(self) -> int:
        """Samples that one unit on every rank adds."""
        return self.world_size * self.multiple_of

    @property
    def fewest_steps(self) -> int:
        """Steps below which no split reaches the target."""
        return -(-self.target // (self.unit * self.max_units))


def make_plan(
    *,
    target: int,
    max_micro_batch_size: int,
    world_size: int = 1,
    split: str = "even",
    multiple_of: int = 1,
    tolerance: str | float = 0.0,
    dataset_size: int | None = None,
    most_listed: int = LARGEST_LISTING,
) -> Plan:
    """Turn a target and the largest size that fits into micro-batches and accumulation steps.

    `even` takes one size for all ranks and steps, and of those within the tolerance the one with
    the fewest steps, then the smallest miss, then the larger. `balanced` takes sizes at most one
    `multiple_of` apart and is always exact, in the fewest steps possible; the tolerance does not
    concern it.

    Cost: O(√target) for `even`, constant for `balanced`, besides the listing of the sizes.

    Args:
        target: samples per optimizer step over all ranks, from `world_size` to 1,000,000,000.
        max_micro_batch_size: the largest micro-batch in samples that fits, at least `multiple_of`.
        world_size: data-parallel ranks, at least 1.
        split: `even` or `balanced`.
        multiple_of: samples that every micro-batch is a multiple of, at least 1.
        tolerance: share of the target by which an even plan may miss it, 0 up to 1.
        dataset_size: samples in the data set; no plan takes more for one step.
        most_listed: micro-batches above which a plan is too long to be listed, up to 1,048,576.

    Returns:
        The plan; its `warnings` say what is unusual about it.

    Raises:
        UsageError: an argument is out of range or contradicts another.
        PlanError: the target cannot be hit under the split.

    Example:
        >>> make_plan(target=256, max_micro_batch_size=97).micro_batch_sizes
        (64, 64, 64, 64)
        >>> make_plan(target=256, max_micro_batch_size=97, split="balanced").micro_batch_sizes
        (86, 85, 85)
    """
    check_int("target", target, 1)
    check_int("world_size", world_size, 1)
    check_int("multiple_of", multiple_of, 1)
    check_int("max_micro_batch_size", max_micro_batch_size, 1)
    check_int("most_listed", most_listed, 1)
    check_split(split)
    check_target(target, world_size=world_size, dataset_size=dataset_size)
    if max_micro_batch_size < multiple_of:
        raise UsageError(
            f"max_micro_batch_size {max_micro_batch_size} is below multiple_of {multiple_of}; "
            f"take --multiple-of {max_micro_batch_size} or less"
        )
    share = parse_fraction(tolerance, name="tolerance")
    question = _Question(
        target=target,
        world_size=world_size,
        multiple_of=multiple_of,
        max_units=max_micro_batch_size // multiple_of,
        # The factor takes back the rounding of a decimal share: 0.29 * 100 is 28.999... in floats.
        allowed_miss=math.floor(share * target * (1 + 1e-12)),
        largest_effective=dataset_size if dataset_size is not None else 2 * LARGEST_TARGET,
        most_listed=most_listed,
    )
    return _even(question) if split == "even" else _balanced(question)


def check_int(name: str, value: object, minimum: int) -> None:
    """Refuse anything but an int of at least `minimum`; raises `UsageError`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} {value!r} is not a whole number; give an int of at least {minimum}")
    if value < minimum:
        raise UsageError(f"{name} {value} is below {minimum}; give at least {minimum}")


def check_split(split: object) -> None:
    """Refuse an unknown split; raises `UsageError`."""
    if split not in SPLITS:
        raise UsageError(f"split {split!r} is unknown; choose {' or '.join(SPLITS)}")


def check_target(target: int, *, world_size: int, dataset_size: int | None) -> None:
    """Refuse a target that no split can serve; raises `UsageError`."""
    if target > LARGEST_TARGET:
        raise UsageError(f"target {target} is above the largest, {LARGEST_TARGET}; give at most that")
    if target < world_size:
        raise UsageError(
            f"target {target} is below world_size {world_size}: every rank needs a sample; "
            f"take --target {world_size} or more, or --world-size {target} or less"
        )
    if dataset_size is None:
        return
    check_int("dataset_size", dataset_size, 1)
    if dataset_size < target:
        raise UsageError(
            f"dataset_size {dataset_size} is below target {target}: one optimizer step would need more samples "
            f"than there are; take --target {dataset_size} or less"
        )


def _even(question: _Question) -> Plan:
    """Plan one size for all, or say why there is none."""
    found = _even_steps(question, question.allowed_miss)
    if found is None:
        raise PlanError(_no_even_plan(question))
    steps, size = found
    _check_listing(steps, question)
    effective = steps * size * question.world_size
    return Plan(
        target=question.target,
        world_size=question.world_size,
        split="even",
        micro_batch_size=size,
        accumulation_steps=steps,
        micro_batch_sizes=(size,) * steps,
        effective_batch_size=effective,
        exact=effective == question.target,
        warnings=tuple(_even_warnings(question, steps, size)),
    )


def _even_steps(question: _Question, allowed_miss: int) -> tuple[int, int] | None:
    """Find the fewest steps and the size nearest to the target, or None.

    Looks for the smallest k with a q ≤ `max_units` and low ≤ k·q ≤ high, low and high being the
    bounds of the effective batch in units. k is tried upwards to √high. Beyond that q is below
    √high and is tried downwards, where the least k that reaches low only grows: the first hit is
    the smallest k.
    """
    unit, most = question.unit, question.max_units
    low = max(1, -(-(question.target - allowed_miss) // unit))
    high = min(question.target + allowed_miss, question.largest_effective) // unit
    if low > high:
        return None
    root = math.isqrt(high)
    steps = next((k for k in range(-(-low // most), root + 1) if k * min(most, high // k) >= low), None)
    if steps is None:
        units = range(min(most, high // (root + 1)), 0, -1)
        steps = next(-(-low // q) for q in units if -(-low // q) * q <= high)
    candidates = range(-(-low // steps), min(most, high // steps) + 1)
    nearest = min(max(question.target // (steps * unit), candidates[0]), candidates[-1])
    units_taken = min(
        (q for q in (nearest, nearest + 1) if q in candidates),
        key=lambda q: (abs(steps * q * unit - question.target), -q),
    )
    return steps, units_taken * question.multiple_of


def _even_warnings(question: _Question, steps: int, size: int) -> Iterator[str]:
    """Say by how much a plan misses, and when it takes far more steps than it must."""
    target, effective = question.target, steps * size * question.world_size
    if effective != target:
        miss = abs(effective - target)
        yield f"effective batch {effective} misses target {target} by {miss} ({format_percent(miss, target)})"
    fewest = question.fewest_steps
    if steps > fewest and (size == question.multiple_of or steps >= 2 * fewest):
        ways = _ways_out(question, below_steps=steps)
        if ways:
            yield (
                f"target {target} under an even split takes {steps} steps of {size} where {fewest} could do; "
                + ", ".join(ways)
            )


def _no_even_plan(question: _Question) -> str:
    """Say why no even plan exists, and what would give one."""
    factors = {"world_size": question.world_size, "multiple_of": question.multiple_of}
    parts = [f"{name} {value}" for name, value in factors.items() if value > 1]
    reason = f"target {question.target} is not divisible by {' × '.join(parts)}"
    if len(parts) > 1:
        reason += f" = {question.unit}"
    if question.allowed_miss:
        reason += f", nor is anything within {question.allowed_miss} of it"
    ways = _ways_out(question, below_steps=None)
    return f"{reason}; {', '.join(ways) if ways else _nearby_targets(question, question.unit)}"


def _ways_out(question: _Question, *, below_steps: int | None) -> list[str]:
    """List the options that would mend an even plan, each with what it gives; only those that do."""
    ways = []
    try:
        balanced = _balanced(question)
    except PlanError:
        pass
    else:
        if below_steps is None or balanced.accumulation_steps < below_steps:
            ways.append(f"--split balanced hits it exactly in {_steps(balanced.accumulation_steps)}")
    tolerance = _enough_tolerance(question)
    if tolerance is not None:
        text, steps, effective = tolerance
        if below_steps is None or steps < below_steps:
            ways.append(f"--tolerance {text} allows {effective} in {_steps(steps)}")
    return ways


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"


def _enough_tolerance(question: _Question) -> tuple[str, int, int] | None:
    """Name a tolerance that gives an even plan in the fewest steps, with its steps and effective batch."""
    target, unit, steps = question.target, question.unit, question.fewest_steps
    largest = min(question.max_units, question.largest_effective // (steps * unit))
    near = target // (steps * unit)
    effectives = [steps * q * unit for q in (near, near + 1) if 1 <= q <= largest]
    if not effectives:
        return None
    miss = min(abs(effective - target) for effective in effectives)
    text = format_percent(miss, target)
    if miss >= target or float(text.removesuffix("%")) >= 100:
        return None
    # Asked again under the tolerance as written: rounded up, it may allow a plan of fewer steps.
    found = _even_steps(question, math.floor(parse_fraction(text) * target * (1 + 1e-12)))
    return None if found is None else (text, found[0], found[0] * found[1] * question.world_size)


def _balanced(question: _Question) -> Plan:
    """Spread the target over ranks and steps as evenly as whole units allow.

    The largest rank holds ⌈units / world_size⌉, which alone sets the fewest steps. Sizes over all
    ranks differ by one unit at most: the ranks' totals do, and so either share both neighbouring
    sizes or meet in one.
    """
    target, ranks, unit = question.target, question.world_size, question.multiple_of
    if target % unit:
        # Any multiple of the unit can be balanced where each rank gets one and a micro-batch can hold two.
        grid = unit if question.max_units > 1 and target > question.unit else question.unit
        raise PlanError(
            f"target {target} is not a multiple of multiple_of {unit}, as the sizes of a balanced plan all are; "
            f"{_nearby_targets(question, grid)}"
        )
    low, extra = divmod(target // unit, ranks)
    steps = -(-(low + (extra > 0)) // question.max_units)
    if low < steps:
        raise PlanError(
            f"target {target} leaves a rank of world_size {ranks} less than one micro-batch of {unit} for each of "
            f"{steps} steps, at most {question.max_units * unit} per micro-batch; "
            f"{_nearby_targets(question, question.unit)}"
        )
    _check_listing(steps * ranks if extra else steps, question)
    small = _spread(low, steps, unit)
    large = _spread(low + 1, steps, unit) if extra else small
    return Plan(
        target=target,
        world_size=ranks,
        split="balanced",
        micro_batch_size=large[0],
        accumulation_steps=steps,
        micro_batch_sizes=large,
        effective_batch_size=target,
        exact=True,
        rank_micro_batch_sizes=(large,) * extra + (small,) * (ranks - extra) if extra else None,
    )


def _spread(units: int, steps: int, unit: int) -> tuple[int, ...]:
    """Split units over steps, the larger sizes first."""
    low, extra = divmod(units, steps)
    return ((low + 1) * unit,) * extra + (low * unit,) * (steps - extra)


def _nearby_targets(question: _Question, grid: int) -> str:
    """Name the multiples of `grid` on both sides of the target."""
    below = question.target // grid * grid
    choices = [target for target in (below, below + grid) if 0 < target <= question.largest_effective]
    if not choices:
        return f"take --multiple-of {question.target // question.world_size} or less"
    return f"--target {' or '.join(map(str, choices))} can be served"


def _check_listing(num_micro_batches: int, question: _Question) -> None:
    """Refuse a plan too long to be listed."""
    if num_micro_batches > question.most_listed:
        raise PlanError(
            f"target {question.target} takes {num_micro_batches} micro-batches of at most "
            f"{question.max_units * question.multiple_of}, above the most that a plan lists, {question.most_listed}; "
            "take a smaller target, a larger micro-batch, or another split"
        )
