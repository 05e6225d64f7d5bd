"""What a search costs on every recorded curve: sizes tried and out-of-memory errors, beside doubling and bisection.

    python tests/benchmarks/search_cost.py [--quick] [--write]

A line for each curve and ceiling, then the distribution, against the floor: a certificate rests on two sizes at least, one that
fits and the next, which does not; on one where the ceiling fits. Nothing here is timed: trials are what costs.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from curves import Curve, recorded_curves, search_curve
from results import GOOD, OTHER, Picture, Result, markdown_table, run_benchmark

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

CEILINGS = (256, 1024, 4096)


def doubling_and_bisection(curve: Curve, ceiling: int) -> tuple[int, int]:
    """Sizes tried and out-of-memory errors of the usual finder: double until it fails, then halve."""
    low, high, size, tried, failed = 0, ceiling + 1, 1, 0, 0
    while high - low > 1:
        tried += 1
        if curve.trial_at(size).fits:
            low = size
            size = min(2 * size, ceiling) if high > ceiling and size < ceiling else (low + high) // 2
        else:
            failed += 1
            high = size
            size = (low + high) // 2
    return tried, failed


@dataclass(frozen=True, kw_only=True)
class Search:
    """One search on one curve."""

    curve: str
    ceiling: int
    maximum: int | None
    answer: int | None
    right: bool
    sizes: int
    ooms: int
    floor: int
    """The fewest sizes that a certificate could rest on."""
    doubling_sizes: int
    """What doubling and bisection tries."""
    doubling_ooms: int
    path: str


def searches(curves: Sequence[Curve]) -> list[Search]:
    """Search every curve under every ceiling."""
    found = []
    for curve in curves:
        for ceiling in CEILINGS:
            search = search_curve(curve, range(1, ceiling + 1))
            answer = search.bracket.fits
            sizes, ooms = doubling_and_bisection(curve, ceiling)
            found.append(
                Search(
                    curve=curve.name,
                    ceiling=ceiling,
                    maximum=curve.true_maximum(ceiling),
                    answer=answer,
                    right=answer in curve.right_answers(ceiling),
                    sizes=search.num_sizes,
                    ooms=search.num_ooms,
                    floor=1 if answer in (None, ceiling) else 2,
                    doubling_sizes=sizes,
                    doubling_ooms=ooms,
                    path=str(search.path),
                )
            )
    return found


def measure(*, quick: bool) -> Result:
    """Search, and put the costs together."""
    curves = recorded_curves()[:: 10 if quick else 1]
    found = searches(curves)
    wrong = [one for one in found if not one.right]
    finders = (
        ("this search", [one.sizes for one in found], [one.ooms for one in found]),
        ("doubling and bisection", [one.doubling_sizes for one in found], [one.doubling_ooms for one in found]),
        ("the floor", [one.floor for one in found], []),
    )
    rows = [
        (
            name,
            f"{statistics.median(sizes):g}",
            max(sizes),
            f"{statistics.median(ooms):g}" if ooms else "",
            max(ooms) if ooms else "",
        )
        for name, sizes, ooms in finders
    ]
    counts = Counter(one.sizes for one in found)
    worst = sorted(found, key=lambda one: (-one.sizes, one.curve))[:5]
    text = "\n\n".join(
        (
            "# What a search costs, on recorded curves of emulated cards",
            f"{len(curves)} curves × {len(CEILINGS)} ceilings: {len(found) - len(wrong)} of {len(found)} answers right.",
            markdown_table(("", "sizes, median", "worst", "OOMs, median", "worst"), rows),
            "![Sizes tried](search_cost.svg)",
            "Sizes tried: " + ", ".join(f"{size} in {counts[size]}" for size in sorted(counts)) + ".",
            markdown_table(
                ("costliest", "ceiling", "maximum", "sizes", "OOMs", "sizes in order"),
                [(one.curve, one.ceiling, one.maximum, one.sizes, one.ooms, one.path) for one in worst],
            ),
        )
    )
    return Result(
        name="search_cost",
        data=[asdict(one) for one in found],
        text=text,
        pictures={
            "search_cost": Picture(
                paint=histogram(found), title="Sizes tried until the certificate stands", size=(8, 3.2)
            )
        },
        misses=tuple(f"{one.curve} under {one.ceiling}: {one.answer} is wrong" for one in wrong),
    )


def histogram(found: Sequence[Search]) -> Callable[[Axes], None]:
    """How many searches took how many sizes, beside doubling and bisection."""

    def paint(axes: Axes) -> None:
        kinds = (
            ("this search", [one.sizes for one in found], GOOD, ""),
            ("doubling and bisection", [one.doubling_sizes for one in found], OTHER, "////"),
        )
        for shift, (name, sizes, colour, hatch) in zip((-0.2, 0.2), kinds, strict=True):
            counts = Counter(sizes)
            places = [size + shift for size in counts]
            fill = colour if not hatch else "none"
            axes.bar(places, list(counts.values()), 0.4, label=name, color=fill, edgecolor=colour, hatch=hatch)
        axes.set_xlabel("sizes tried")
        axes.set_ylabel("searches")
        axes.legend(frameon=False)

    return paint


if __name__ == "__main__":
    sys.exit(run_benchmark(measure, __doc__))
