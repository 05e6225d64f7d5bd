"""A plan in the forms that other programs read."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autobatch.plan import Plan

__all__ = ["FORMATS", "plan_as_arguments", "plan_as_environment"]

FORMATS = ("table", "json", "env", "args")
"""What `--format` takes: `env` for `eval "$(…)"`, `args` for a command line."""


def plan_as_environment(plan: Plan) -> str:
    """Write the plan as `export NAME=value` lines that a shell may evaluate."""
    values = {
        "AUTOBATCH_TARGET": plan.target,
        "AUTOBATCH_WORLD_SIZE": plan.world_size,
        "AUTOBATCH_MICRO_BATCH_SIZE": plan.micro_batch_size,
        "AUTOBATCH_ACCUMULATION_STEPS": plan.accumulation_steps,
        "AUTOBATCH_EFFECTIVE_BATCH_SIZE": plan.effective_batch_size,
        "AUTOBATCH_MICRO_BATCH_SIZES": ",".join(map(str, plan.micro_batch_sizes)),
    }
    return "\n".join(f"export {name}={shlex.quote(str(value))}" for name, value in values.items())


def plan_as_arguments(plan: Plan) -> str:
    """Write the plan as the two flags that most training scripts have in some form."""
    return f"--micro-batch-size {plan.micro_batch_size} --accumulation-steps {plan.accumulation_steps}"
