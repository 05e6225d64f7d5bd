"""Reports that tests of what people see begin with: one probe with a trial of every kind."""

from __future__ import annotations

import dataclasses

from autobatch.options import ProbeOptions
from autobatch.report import Device, Memory, Report, Versions
from autobatch.trial import Outcome, Trial

GIB = 1 << 30
FITS, OVER, THRASHES, OOM = Outcome.FITS, Outcome.OVER_BUDGET, Outcome.THRASHES, Outcome.OUT_OF_MEMORY


def trial(window: tuple[int, ...], outcome: Outcome, gib: float, *, confirmation: bool = False) -> Trial:
    """A trial whose footprint is so many GiB."""
    return Trial(
        micro_batch_size=max(window),
        window=window,
        outcome=outcome,
        micro_batches_per_step=len(window),
        steps=3,
        peak_allocated_bytes=int((gib - 1) * GIB),
        peak_reserved_bytes=int((gib - 0.5) * GIB),
        footprint_bytes=int(gib * GIB),
        alloc_retries=0,
        seconds_per_step=None,
        confirmation=confirmation,
        oom_request_bytes=7 * GIB if outcome is OOM else 0,
    )


MIXED = (
    trial((8, 8), FITS, 10.0),
    trial((37, 37), FITS, 38.0),
    trial((38, 38), OOM, 35.0),
    trial((36, 37), FITS, 37.6, confirmation=True),
    trial((39, 39), OVER, 38.9),
    trial((40, 40), THRASHES, 38.5),
    trial((42,), OOM, 35.0),
)


def report(**changes: object) -> Report:
    """A report, some of its fields changed."""
    options = ProbeOptions(target=256, split="balanced")
    whole = Report(
        basis="emulated",
        workload="gpt2",
        fingerprint="0" * 16,
        plan=options.make_plan(37),
        objective="max",
        measured_at="2026-11-20T11:00:00Z",
        micro_batches_per_step=2,
        max_micro_batch_size=37,
        smallest_failing=38,
        ceiling_reached=False,
        monotone=True,
        device=Device(
            name="NVIDIA A100-SXM4-40GB", uuid=None, total_bytes=44 * GIB, compute_capability="8.0", driver="550.1"
        ),
        memory=Memory(
            budget_bytes=int(38.6 * GIB), headroom_bytes=GIB, other_tenants_bytes=4 * GIB, context_bytes=GIB // 2
        ),
        trials=MIXED,
        versions=Versions(autobatch="0", torch="2.15.0", cuda="13"),
        options=options,
        certified=True,
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]  # the caller names fields


NOTHING_FITS = {
    "plan": None,
    "max_micro_batch_size": None,
    "smallest_failing": 1,
    "trials": (trial((1, 1), OOM, 38.0),),
}
