"""What the memory curve shows: the bands of memory, the trials' heights and the line fitted through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.trial import Outcome

if TYPE_CHECKING:
    from autobatch.present.themes import Theme
    from autobatch.report import Report
    from autobatch.trial import Trial

__all__ = ["GIB", "Band", "fitted_line", "has_height", "memory_bands"]

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Band:
    """Memory that no trial's tensors can have."""

    name: str
    gid: str
    colour: str
    low_bytes: int
    high_bytes: int

    @property
    def size_bytes(self) -> int:
        """The band's height."""
        return self.high_bytes - self.low_bytes


def memory_bands(report: Report, theme: Theme) -> list[Band]:
    """Share out the card: the context at the bottom; above the budget the headroom, then the rest, then others' memory."""
    memory, total = report.memory, report.device.total_bytes
    before_headroom = memory.budget_bytes + memory.headroom_bytes
    others_from = total - (memory.other_tenants_bytes or 0)
    rest = "beyond the limit" if report.options.memory_limit_bytes == before_headroom else "kept by the driver"
    bands = [
        Band(
            name="CUDA context", gid="context", colour=theme.context, low_bytes=0, high_bytes=memory.context_bytes or 0
        ),
        Band(
            name="headroom",
            gid="headroom",
            colour=theme.headroom,
            low_bytes=memory.budget_bytes,
            high_bytes=before_headroom,
        ),
        Band(name=rest, gid="beyond", colour=theme.beyond, low_bytes=before_headroom, high_bytes=others_from),
        Band(name="other tenants", gid="tenants", colour=theme.tenants, low_bytes=others_from, high_bytes=total),
    ]
    return [band for band in bands if band.size_bytes > 0]


def has_height(trial: Trial) -> bool:
    """Tell whether the trial's footprint says what its size needs.

    After running out of memory it does not. Nor do the tensors' peak and the bytes asked for: the peak may lie before
    the request, and with free memory in pieces their sum may even be below the budget. Known is only: more than that.
    """
    return trial.outcome is not Outcome.OUT_OF_MEMORY


def fitted_line(report: Report) -> tuple[tuple[int, int], tuple[float, float]] | None:
    """Fit a line through what fitted, from its smallest to its largest size; None where fewer than two sizes did.

    Trials with one and with two micro-batches in a step lie on different lines, and a window of two sizes on neither.
    """
    from statistics import linear_regression

    count = report.micro_batches_per_step
    fitted = [t for t in report.trials if t.fits and t.window == (t.micro_batch_size,) * count]
    sizes = [trial.micro_batch_size for trial in fitted]
    if len(set(sizes)) < 2:
        return None
    slope, intercept = linear_regression(sizes, [trial.footprint_bytes / GIB for trial in fitted])
    first, last = min(sizes), max(sizes)
    return (first, last), (intercept + slope * first, intercept + slope * last)
