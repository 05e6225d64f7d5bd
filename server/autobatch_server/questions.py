"""A question as it is asked over HTTP, put into the library's form, or refused with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch import PlanError, ProbeOptions, UsageError
from autobatch_server.problems import ProblemError

if TYPE_CHECKING:
    from autobatch_server.schemas import SplitName

__all__ = ["LONGEST_PLAN", "make_options", "refuse_plan"]

LONGEST_PLAN = 10_000
"""Most sizes that a plan lists in an answer to a query: the library's own bound would make answers of megabytes."""


def make_options(
    *, target: int, world_size: int, split: SplitName, multiple_of: int = 1, tolerance: float = 0.0
) -> ProbeOptions:
    """Put a question into the library's form.

    Raises:
        ProblemError: the values contradict each other.
    """
    if target < world_size:
        raise ProblemError(
            "invalid-request",
            f"target {target} is below world_size {world_size}: every rank needs a sample, so take target {world_size} or more",
        )
    try:
        return ProbeOptions(
            target=target,
            world_size=world_size,
            split=split,
            multiple_of=multiple_of,
            tolerance=tolerance,
        )
    except UsageError:
        share = -(-target // world_size)
        raise ProblemError(
            "invalid-request",
            f"multiple_of {multiple_of} is above the {share} samples that each of {world_size} ranks takes of target {target}",
        ) from None


def refuse_plan(options: ProbeOptions, error: PlanError) -> ProblemError:
    """Say that a target cannot be hit, and what would be."""
    del error  # its ways out are written for the command line
    unit = options.world_size * options.multiple_of
    what = f"target {options.target} cannot be hit under the {options.split} split by world_size {options.world_size}"
    if options.multiple_of > 1:
        what += f" and multiple_of {options.multiple_of}"
    if options.target % unit == 0:
        return ProblemError(
            "no-plan",
            f"{what} in a plan of at most {LONGEST_PLAN} micro-batches, the most that is listed here: take a smaller target "
            "or more ranks",
        )
    below, above = options.target // unit * unit, -(-options.target // unit) * unit
    near = f"{below} or {above}" if below else str(above)
    others = "" if options.split == "balanced" or options.multiple_of > 1 else ", split=balanced hits it exactly"
    return ProblemError("no-plan", f"{what}: target {near} can be{others}")
