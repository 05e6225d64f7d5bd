"""How a card's memory came to the budget of a trial, in lines that add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.report import Report

__all__ = ["BudgetLine", "budget_lines"]

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class BudgetLine:
    """One line of the sum."""

    name: str
    mebibytes: int
    """What it adds, or below 0 what it takes away, in whole MiB."""
    note: str


def budget_lines(report: Report) -> tuple[BudgetLine, ...]:
    """Break the card's memory down to the budget.

    Returns:
        The card, what is taken off it, and last the budget, which is the sum of the lines above it as they are
        written, in whole MiB; each is less than 1 MiB off.
    """
    memory, device = report.memory, report.device
    limit = report.options.memory_limit_bytes
    total, headroom, budget = device.total_bytes, memory.headroom_bytes, memory.budget_bytes
    tenants = memory.other_tenants_bytes
    others = "unknown" if tenants is None else format_bytes(tenants)
    before_headroom = budget + headroom
    if limit == before_headroom:
        # The limit is the smaller: what the driver and others take is of the rest.
        beyond = f"--memory-limit {format_bytes(limit)}; other tenants, here {others}, take of this first"
        parts = [("beyond the limit", total - limit, beyond)]
    else:
        parts = [
            ("kept by the driver", total - (tenants or 0) - before_headroom, "in NVML's total, but for no program"),
            ("other tenants", tenants or 0, "unknown, counted as nothing" if tenants is None else ""),
        ]
    parts.append(("headroom", headroom, "left free on purpose"))
    what = f"{format_bytes(budget)}: what a trial may use"
    if limit is not None and limit != before_headroom:
        what += f"; --memory-limit {format_bytes(limit)} is no less"
    whole = _whole_mebibytes([*(size for _, size, _ in parts), budget])
    return (
        BudgetLine(name="card", mebibytes=sum(whole), note=f"compute capability {device.compute_capability}"),
        *(
            BudgetLine(name=name, mebibytes=-size, note=note)
            for (name, _, note), size in zip(parts, whole[:-1], strict=True)
        ),
        BudgetLine(name="budget", mebibytes=whole[-1], note=what),
    )


def _whole_mebibytes(sizes: Sequence[int]) -> list[int]:
    """Round sizes in bytes to whole MiB so that they sum to their rounded sum: the largest remainders go up."""
    whole = [size // _MIB for size in sizes]
    missing = (sum(sizes) + _MIB // 2) // _MIB - sum(whole)
    by_remainder = sorted(range(len(sizes)), key=lambda index: sizes[index] % _MIB, reverse=True)
    for index in by_remainder[:missing]:
        whole[index] += 1
    return whole
