"""From a target and the largest micro-batch of each rank to sizes: pure arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.errors import PlanError, UsageError
from autobatch.plan import LARGEST_LISTING, Plan, check_int, check_target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["make_rank_plan"]


def make_rank_plan(
    *,
    target: int,
    max_micro_batch_sizes: Sequence[int],
    multiple_of: int = 1,
    dataset_size: int | None = None,
) -> Plan:
    """Turn a target and the largest size that fits on each rank into micro-batches of unequal ranks.

    Every rank takes as many steps as the others, the fewest that the sizes allow, and of the target what its largest size is
    of all: a card with twice the room takes twice the samples. Always exact. Each rank gets at least one micro-batch of
    `multiple_of` samples for each step.

    Cost: O(ranks · log(ranks)), besides the listing of the sizes.

    Args:
        target: samples per optimizer step over all ranks, from the number of ranks to 1,000,000,000.
        max_micro_batch_sizes: the largest micro-batch in samples that fits, by rank, each at least `multiple_of`.
        multiple_of: samples that every micro-batch is a multiple of, at least 1.
        dataset_size: samples in the data set; no plan takes more for one step.

    Returns:
        The plan, `balanced`; its `rank_micro_batch_sizes` has each rank's window. Weights are nᵢ / target, as for any plan.

    Raises:
        UsageError: an argument is out of range or contradicts another.
        PlanError: the target is no multiple of `multiple_of`, or too small for so many steps of so many ranks.

    Example:
        >>> make_rank_plan(target=256, max_micro_batch_sizes=[64, 32]).rank_micro_batch_sizes
        ((57, 57, 57), (29, 28, 28))
    """
    check_int("target", target, 1)
    check_int("multiple_of", multiple_of, 1)
    ranks = len(_checked(max_micro_batch_sizes, multiple_of))
    check_target(target, world_size=ranks, dataset_size=dataset_size)
    units, left_over = divmod(target, multiple_of)
    most = [size // multiple_of for size in max_micro_batch_sizes]
    if left_over:
        raise PlanError(
            f"target {target} is not a multiple of multiple_of {multiple_of}, as the sizes of ranks of their own all are; "
            f"take --target {units * multiple_of or multiple_of} or {(units + 1) * multiple_of}"
        )
    steps = -(-units // sum(most))
    if units < steps * ranks:
        raise PlanError(
            f"target {target} leaves a rank of {ranks} less than one micro-batch of {multiple_of} for each of {steps} steps; "
            f"take --target {steps * ranks * multiple_of}"
        )
    if steps * ranks > LARGEST_LISTING:
        raise PlanError(
            f"target {target} takes {steps * ranks} micro-batches over all ranks, above the most that a plan lists, "
            f"{LARGEST_LISTING}; take a smaller target or a larger micro-batch"
        )
    shares = [steps + more for more in _apportion(units - steps * ranks, [steps * (room - 1) for room in most])]
    windows = tuple(tuple(size * multiple_of for size in _spread(share, steps)) for share in shares)
    return Plan(
        target=target,
        world_size=ranks,
        split="balanced",
        micro_batch_size=max(map(max, windows)),
        accumulation_steps=steps,
        micro_batch_sizes=windows[0],
        effective_batch_size=target,
        exact=True,
        rank_micro_batch_sizes=windows if len(set(windows)) > 1 else None,
    )


def _checked(sizes: Sequence[int], multiple_of: int) -> Sequence[int]:
    """Refuse anything but sizes of at least `multiple_of`."""
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise UsageError(f"max_micro_batch_sizes {sizes!r} is not a list of whole numbers, one for each rank")
    for rank, size in enumerate(sizes):
        check_int(f"max_micro_batch_sizes[{rank}]", size, 1)
        if size < multiple_of:
            raise UsageError(
                f"max_micro_batch_sizes[{rank}] {size} is below multiple_of {multiple_of}; take --multiple-of {size} or less"
            )
    return sizes


def _apportion(units: int, room: Sequence[int]) -> list[int]:
    """Share out units in proportion to the room of each, whole ones, by the largest remainders; all fit into it."""
    total = sum(room)
    if not total:
        return [0] * len(room)
    shares = [units * each // total for each in room]
    # A share of less than a unit was rounded off each time, and only where there was room for it.
    by_remainder = sorted(range(len(room)), key=lambda rank: (-(units * room[rank] % total), rank))
    for rank in by_remainder[: units - sum(shares)]:
        shares[rank] += 1
    return shares


def _spread(units: int, steps: int) -> Iterator[int]:
    """Units over steps, the larger sizes first."""
    low, extra = divmod(units, steps)
    return (low + (step < extra) for step in range(steps))
