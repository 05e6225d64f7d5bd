"""A plan in the forms that other programs read."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from autobatch.errors import PlanError, UsageError
from autobatch.variables import plan_variables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autobatch.options import ProbeOptions
    from autobatch.placement import Placement
    from autobatch.plan import Plan
    from autobatch.report import Basis

__all__ = [
    "ARGUMENT_FORMS",
    "FORMATS",
    "PLACEMENT_FORMS",
    "PROLOG_FORM",
    "SUBMISSION_FORMS",
    "check_form",
    "placement_as_arguments",
    "placement_as_environment",
    "plan_as_arguments",
    "plan_as_environment",
    "plan_as_prolog",
    "sizes_note",
]

ARGUMENT_FORMS: dict[str, str] = {
    "args": "--micro-batch-size {micro} --accumulation-steps {steps}",
    "args:hf": "--per_device_train_batch_size {micro} --gradient_accumulation_steps {steps}",
    "args:lightning": "--data.batch_size {micro} --trainer.accumulate_grad_batches {steps}",
    "args:deepspeed": '{{"train_batch_size": {effective}, "train_micro_batch_size_per_gpu": {micro}, '
    '"gradient_accumulation_steps": {steps}}}',
    "args:torchtune": "batch_size={micro} gradient_accumulation_steps={steps}",
}
"""A plan of one size as words of a command line, or as the part of a configuration that stands for it.

`hf`: `HfArgumentParser` on `TrainingArguments`. `lightning`: `LightningCLI`, of a data module with a `batch_size`.
`deepspeed`: its JSON configuration, in which the first is the product of the others and the ranks. `torchtune`: overrides of
a recipe's configuration. (Sources: https://huggingface.co/docs/transformers/main_classes/trainer,
https://lightning.ai/docs/pytorch/stable/cli/lightning_cli.html, https://www.deepspeed.ai/docs/config-json/,
https://docs.pytorch.org/torchtune/stable/deep_dives/configs.html.)
"""

PLACEMENT_FORMS: dict[str, str] = {
    "slurm": "--gres=gpu:{type}:{count}",
    "slurm:constraint": "--gres=gpu:{count} --constraint={type}",
}
"""Cards as words of `sbatch`: by the type of their generic resource, or by a feature of their nodes.

(Source: https://slurm.schedmd.com/sbatch.html, `--gres`, whose count is that of one node, and `--constraint`.)
"""

PROLOG_FORM = "slurm:prolog"
"""The plan as Slurm reads it of a TaskProlog."""

SUBMISSION_FORMS: dict[str, Mapping[str, str]] = {
    "sbatch": {"SBATCH_GRES": "gpu:{type}:{count}"},
    "sbatch:constraint": {"SBATCH_GRES": "gpu:{count}", "SBATCH_CONSTRAINT": "{type}"},
}
"""The same as variables that `sbatch` reads, which count more than a script's lines and less than options.

(Source: https://slurm.schedmd.com/sbatch.html, "Input environment variables".)
"""

FORMATS = ("table", "json", "env", *ARGUMENT_FORMS)
"""What `--format` takes: `env` for `eval "$(…)"`, `args` and what begins so for a command line."""

_SLURM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def plan_as_environment(plan: Plan, *, basis: Basis | None = None, measurement: str | None = None) -> str:
    """Write the plan as lines that a shell may evaluate: `export NAME=value`, or `unset NAME`.

    Args:
        plan: the plan.
        basis: where its maximum comes from; None where nobody measured it.
        measurement: the id under which the service keeps what was measured; None where it came from no service.

    Raises:
        PlanError: a list of sizes is longer than Linux passes on to a program.
    """
    values = plan_variables(plan, basis=basis, measurement=measurement)
    return "\n".join(
        f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}" for name, value in values.items()
    )


def plan_as_arguments(plan: Plan, form: str = "args") -> str:
    """Write the plan as the flags, or the part of a configuration, of one of `ARGUMENT_FORMS`.

    Raises:
        PlanError: the plan mixes sizes, of which one flag names one.
    """
    if len(plan.sizes) == 1:
        return ARGUMENT_FORMS[form].format(
            micro=plan.micro_batch_size, steps=plan.accumulation_steps, effective=plan.effective_batch_size
        )
    # Balanced sizes are one `multiple_of` apart; an even plan needs it and the ranks to divide the target.
    has_even_plan = plan.target % (plan.world_size * (plan.sizes[0] - plan.sizes[-1])) == 0
    even = "--split even for one size, or " if has_even_plan else ""
    raise PlanError(
        f"the plan mixes micro-batches of {_sizes_text(plan)}, of which --format {form} can name one only: "
        f"take {even}--format env or json for all of them"
    )


def placement_as_arguments(placement: Placement, form: str, *, type_name: str | None = None) -> str:
    """Write the cards of a placement as words of a scheduler's command line.

    Args:
        placement: the placement.
        form: one of `PLACEMENT_FORMS`.
        type_name: what the scheduler calls the card; the name that `AutoDetect=nvml` gives it where None.

    Raises:
        UsageError: the name has signs that a shell or Slurm reads otherwise.
    """
    return PLACEMENT_FORMS[form].format(type=_slurm_type(placement, type_name), count=placement.count)


def plan_as_prolog(plan: Plan, *, basis: Basis | None = None, measurement: str | None = None) -> str:
    """Write the plan as lines that Slurm reads of a TaskProlog: `export NAME=value` with the value as it is, or `unset NAME`.

    (Source: https://slurm.schedmd.com/prolog_epilog.html, "TaskProlog".)

    Raises:
        PlanError: a list of sizes is longer than Linux passes on to a program.
    """
    values = plan_variables(plan, basis=basis, measurement=measurement)
    return "\n".join(f"unset {name}" if value is None else f"export {name}={value}" for name, value in values.items())


def placement_as_environment(
    placement: Placement, plan: Plan, form: str, *, workload: str, type_name: str | None = None
) -> str:
    """Write a placement, with its plan, as lines that a shell may evaluate before `sbatch`.

    Args:
        placement: the placement.
        plan: its plan.
        form: one of `SUBMISSION_FORMS`.
        workload: the training job, which the job's tasks may ask about again.
        type_name: as for `placement_as_arguments`.

    Raises:
        UsageError: the name has signs that Slurm reads otherwise.
        PlanError: a list of sizes is longer than Linux passes on to a program.
    """
    name = _slurm_type(placement, type_name)
    said = {"AUTOBATCH_WORKLOAD": workload, "AUTOBATCH_GPU": placement.gpu, "AUTOBATCH_SPLIT": plan.split}
    said |= {key: text.format(type=name, count=placement.count) for key, text in SUBMISSION_FORMS[form].items()}
    lines = [f"export {key}={shlex.quote(value)}" for key, value in said.items()]
    return "\n".join([plan_as_environment(plan, basis=placement.basis, measurement=placement.measurement), *lines])


def _slurm_type(placement: Placement, type_name: str | None) -> str:
    from autobatch.gpu.catalogue import find_card

    name = find_card(placement.gpu).slurm_type if type_name is None else type_name
    if not _SLURM_NAME.fullmatch(name):
        raise UsageError(f"type {name!r} of {placement.gpu} is not a name of letters, digits, '.', '_' and '-'")
    return name


def check_form(options: ProbeOptions, form: str) -> None:
    """Refuse, before a probe, a form in which none of its plans could be written.

    Raises:
        PlanError: the form is one of `ARGUMENT_FORMS`, and every plan of these options mixes sizes.
    """
    if form in ARGUMENT_FORMS and not options.can_be_one_size:
        times = f" × multiple_of {options.multiple_of}" if options.multiple_of > 1 else ""
        raise PlanError(
            f"target {options.target} is not divisible by world_size {options.world_size}{times}: under --split "
            f"{options.split} the ranks' sizes differ, of which --format {form} can name one only; take --format env or "
            "json, or --split even with a --tolerance"
        )


def sizes_note(plan: Plan) -> str:
    """Say which variables hold the sizes of a plan that mixes them; empty where one number does."""
    if len(plan.sizes) == 1:
        return ""
    where = "AUTOBATCH_MICRO_BATCH_SIZES" if plan.rank_micro_batch_sizes is None else "AUTOBATCH_RANK_MICRO_BATCH_SIZES"
    return (
        f"AUTOBATCH_MICRO_BATCH_SIZE is unset, since the plan mixes micro-batches of {_sizes_text(plan)}: "
        f"{where} lists them"
    )


def _sizes_text(plan: Plan) -> str:
    return " and ".join(map(str, plan.sizes))
