"""A plan as environment variables, which every program can read. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.plan import Plan
    from autobatch.report import Basis

__all__ = ["plan_variables"]

# Linux starts no program whose environment has a longer `NAME=value` (MAX_ARG_STRLEN, 32 pages, its closing 0 included;
# include/uapi/linux/binfmts.h): every command that inherited it would fail.
_LONGEST_VARIABLE = 32 * 4096 - 1


def plan_variables(plan: Plan, *, basis: Basis | None = None, measurement: str | None = None) -> dict[str, str | None]:
    """Say a plan in environment variables, by their names.

    What one number or one list cannot say truly is None rather than rounded: AUTOBATCH_MICRO_BATCH_SIZE where sizes
    differ, AUTOBATCH_MICRO_BATCH_SIZES where they differ between ranks. Every name is there, so that a reader can unset what
    an earlier plan left.

    Args:
        plan: the plan.
        basis: where its maximum comes from; None where nobody measured it.
        measurement: the id under which the service keeps what was measured; None where it came from no service.

    Raises:
        PlanError: a list of sizes is longer than Linux passes on to a program.
    """
    ranks = plan.rank_micro_batch_sizes
    values = {
        "AUTOBATCH_BASIS": basis,
        "AUTOBATCH_MEASUREMENT": measurement,
        "AUTOBATCH_TARGET": plan.target,
        "AUTOBATCH_WORLD_SIZE": plan.world_size,
        "AUTOBATCH_EFFECTIVE_BATCH_SIZE": plan.effective_batch_size,
        "AUTOBATCH_EXACT": int(plan.exact),
        "AUTOBATCH_ACCUMULATION_STEPS": plan.accumulation_steps,
        "AUTOBATCH_MICRO_BATCH_SIZE": plan.micro_batch_size if len(plan.sizes) == 1 else None,
        "AUTOBATCH_MICRO_BATCH_SIZES": _listing(plan.micro_batch_sizes) if ranks is None else None,
        "AUTOBATCH_RANK_MICRO_BATCH_SIZES": None if ranks is None else ";".join(map(_listing, ranks)),
    }
    return {name: None if value is None else _checked(name, str(value)) for name, value in values.items()}


def _checked(name: str, value: str) -> str:
    length = len(f"{name}={value}")
    if length > _LONGEST_VARIABLE:
        raise PlanError(
            f"{name} would have {length} characters, above the {_LONGEST_VARIABLE} that Linux passes on to a program: "
            "take --format json"
        )
    return value


def _listing(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))
