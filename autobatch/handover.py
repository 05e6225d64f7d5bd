"""A plan found by another process, taken up where training starts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.errors import AutobatchError, PlanError, UsageError
from autobatch.probing import nothing_fits
from autobatch.report import Report
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from autobatch.facts import DeviceFacts
    from autobatch.plan import Plan

__all__ = ["PLAN_FILE", "plan_from_env", "write_plan_file"]

PLAN_FILE = "AUTOBATCH_PLAN_FILE"
"""The variable that names the file of a report."""

# Two cards of a kind differ a little in what their driver keeps for itself; cards of two kinds by gigabytes.
_SAME_MEMORY = 0.02


def plan_from_env(
    *,
    device: str = "cuda:0",
    reprobe: Callable[[], Report] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Plan:
    """Take up the plan in the file that `AUTOBATCH_PLAN_FILE` names, where it holds on the card that this process got.

    The file is what `autobatch probe --plan-file FILE` (or `--format json`) wrote, earlier or on another machine. It holds where
    the card is of the same kind with as much memory, torch is the same version, as many ranks train, and what its largest
    micro-batch takes is free now. With a process group every rank calls it alike, and all take the same way.

    Args:
        device: the device that this process trains on.
        reprobe: probes anew, as by `lambda: autobatch.probe(...)`, where there is no such file or its plan does not hold; without
            it that is an error.
        environment: the environment variables; this process's own where None.

    Returns:
        The plan.

    Raises:
        UsageError: the variable is not set, or its file cannot be read.
        PlanError: the plan does not hold here; the message says why.
        NothingFitsError: the file says that nothing fits.
        NoGpuError: this process has no NVIDIA GPU.

    Example:
        >>> plan = plan_from_env(reprobe=lambda: autobatch.probe(step, target=256, **parts))  # doctest: +SKIP
        >>> plan.micro_batch_size, plan.accumulation_steps  # doctest: +SKIP
        (32, 8)
    """
    variables = os.environ if environment is None else environment
    report, problem = None, None
    try:
        report = _read(variables)
        _check(report, device, variables)
    except AutobatchError as error:
        problem = error
    if _all_take_it(taken=problem is None) and report is not None and report.plan is not None:
        return report.plan
    if reprobe is None:
        raise problem or PlanError("another rank cannot take up the plan: what it printed says why")
    found = reprobe()
    if found.plan is None:
        raise nothing_fits(found)
    return found.plan


def write_plan_file(report: Report, path: Path) -> None:
    """Write a report where `plan_from_env` finds it: all of it or nothing.

    Raises:
        UsageError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(report.to_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UsageError(f"cannot write the plan file {path}: {error.strerror}") from None


def _read(variables: Mapping[str, str]) -> Report:
    name = variables.get(PLAN_FILE)
    if not name:
        raise UsageError(f"{PLAN_FILE} is not set: let it name what `autobatch probe --plan-file FILE` wrote")
    try:
        text = Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"{PLAN_FILE} names {name}, which cannot be read: {error.strerror}") from None
    try:
        report = Report.from_json(text)
    except UsageError as error:
        raise UsageError(f"{PLAN_FILE} names {name}: {error}") from None
    if report.plan is None:
        raise nothing_fits(report)
    return report


def _check(report: Report, device: str, variables: Mapping[str, str]) -> None:
    """Hold a report against this process.

    Raises:
        PlanError: it is of another number of ranks, card or torch, or what it takes is not free.
    """
    from autobatch.gpu.opening import open_device

    plan = report.plan
    if plan is None:
        raise nothing_fits(report)
    ranks = _num_ranks(variables)
    if plan.world_size != ranks:
        raise PlanError(f"the plan is for {plan.world_size} ranks, and {ranks} train: probe with --world-size {ranks}")
    asked = dataclasses.replace(report.options, device=device, emulate=None, tenant=0)
    with open_device(asked) as opened:
        _check_card(report, _rank(variables), opened.facts)


def _check_card(report: Report, rank: int, facts: DeviceFacts) -> None:
    there, here = report.device if report.ranks is None else report.ranks[rank].device, facts.device
    if there.name != here.name or abs(here.total_bytes - there.total_bytes) > _SAME_MEMORY * there.total_bytes:
        raise PlanError(
            f"the plan was found on {there.name} with {format_bytes(there.total_bytes)}, and this is {here.name} with "
            f"{format_bytes(here.total_bytes)}: probe on this card, or pass reprobe="
        )
    if _release(report.versions.torch) != _release(facts.torch_version):
        raise PlanError(
            f"the plan was found with torch {report.versions.torch}, and this is {facts.torch_version}: probe with this "
            "version, or pass reprobe="
        )
    sizes = set(report.plan.sizes if report.plan is not None else ())
    # Of several ranks the trials are those of the one that bounds all: what a card with more room takes is not among them.
    is_of_here = there == report.device
    needed = max(
        (each.footprint_bytes for each in report.trials if is_of_here and each.fits and each.micro_batch_size in sizes),
        default=0,
    )
    if needed > facts.memory.budget_bytes:
        others = facts.memory.other_tenants_bytes
        held = f", of which others hold {format_bytes(others)}" if others else ""
        raise PlanError(
            f"the plan takes {format_bytes(needed)}, and the budget on {here.name} is "
            f"{format_bytes(facts.memory.budget_bytes)} now{held}: free it, or pass reprobe="
        )


def _release(version: str | None) -> str | None:
    """A version without what only names its build: `2.8.0+cu128` is 2.8.0."""
    return None if version is None else version.partition("+")[0]


def _num_ranks(variables: Mapping[str, str]) -> int:
    from autobatch.ranks.link import num_ranks

    said = variables.get("WORLD_SIZE", "1")
    return max(num_ranks(), int(said) if said.isdecimal() else 1)


def _rank(variables: Mapping[str, str]) -> int:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    said = variables.get("RANK", "0")
    return int(said) if said.isdecimal() else 0


def _all_take_it(*, taken: bool) -> bool:
    """Whether every rank can take up its plan: they take the same way."""
    from autobatch.ranks.link import RankLink, num_ranks

    if num_ranks() == 1:
        return taken
    with RankLink(None) as link:
        return all(link.exchange(taken))
