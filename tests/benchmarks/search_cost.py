"""What a search costs on every recorded curve: sizes tried and out-of-memory errors, beside doubling and bisection.

    python tests/benchmarks/search_cost.py

Prints a line for each curve and ceiling, then medians and worst cases. Nothing here is timed: trials are what costs.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from curves import Curve, recorded_curves, search_curve

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


def main() -> None:
    """Print the table."""
    curves = recorded_curves()
    print(f"{'curve':<46} {'ceiling':>7} {'maximum':>7} {'sizes':>5} {'OOMs':>4}   path")
    rows = []
    for curve in curves:
        for ceiling in CEILINGS:
            search = search_curve(curve, range(1, ceiling + 1))
            true = curve.true_maximum(ceiling)
            answer = search.bracket.fits
            wrong = "" if answer in curve.right_answers(ceiling) else f"   WRONG: {answer}"
            note = "" if answer == true else f"   (not monotone: {answer} fits, the next does not)"
            cost = f"{search.num_sizes:>5} {search.num_ooms:>4}"
            print(f"{curve.name:<46} {ceiling:>7} {true!s:>7} {cost}   {search.path}{wrong}{note}")
            rows.append((search.num_sizes, search.num_ooms, *doubling_and_bisection(curve, ceiling), not wrong))
    print(f"\n{len(curves)} curves × {len(CEILINGS)} ceilings: {sum(row[4] for row in rows)} of {len(rows)} exact")
    for what, sizes, ooms in (("this search", 0, 1), ("doubling and bisection", 2, 3)):
        tried, failed = [row[sizes] for row in rows], [row[ooms] for row in rows]
        print(
            f"{what:<24} sizes: median {statistics.median(tried):g}, worst {max(tried)};  "
            f"OOMs: median {statistics.median(failed):g}, worst {max(failed)}"
        )


if __name__ == "__main__":
    main()
