"""Emulated memory against published measurements of real cards, each rebuilt with the settings of its source.

    python tests/benchmarks/against_real.py [--quick] [--write] [--only NAME …]

The figures with their sources, settings and doubts stand in `tests/data/real/published/`, one file for each source; recordings of
a card of our own go beside them in the same form. `rebuilt.py` trains what each source trained. Where a source's version of
transformers or timm matters, that version is fetched into a throw-away folder. Nothing is tuned until it agrees, and no row is
left out because it does not. `--quick` takes the small scripts alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from results import BAD, GOOD, MUTED, Picture, Result, add_flags, finish, machine, markdown_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests/data/real/published"
QUICK = ("small-scripts", "transposed-convolution")
OOM = "OOM"
NOT_REBUILT = """\
- Rows of https://github.com/rasbt/pytorch-memory-optim with DeepSpeed, FSDP and 8-bit Adam: they need several GPUs, or kernels of
  bitsandbytes, which are not emulated.
- https://github.com/pytorch/pytorch/issues/147449 and /78731: the scripts are not given whole.
- https://github.com/karpathy/minGPT/pull/106: the settings are not given.
- https://github.com/pytorch/pytorch/issues/13412, /22741, /31500 and /38568: convolutions with cuDNN 7, whose algorithms are no
  more.
- optimum-benchmark's figures of an A10G: what was found of them holds none of CUDA.
- Further training tables of transformers' model pages (ALBERT, DistilBERT, BioGPT, BEiT, Data2Vec): in the same form as those
  here, and not taken up yet."""


_WHAT_IS_WHAT = (
    "Emulated figures are of this version on its emulated cards; the others are published measurements of real cards, by others, "
    "with versions of torch from 1.2 to 2.9. No card of our own has been measured yet."
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Published figures of one kind."""

    name: str
    group: str
    source: str
    card: str
    software: str
    quantity: str
    unit: str
    settings: str
    emulated_card: str
    packages: Sequence[str]
    """What is fetched for it, at the source's version."""
    rebuild: dict[str, Any]
    """The function of `rebuilt.py`, and its arguments."""
    doubts: Sequence[str]
    figures: dict[str, float | str]
    """By case: the figure, or `OOM`."""

    @property
    def is_bracket(self) -> bool:
        """Whether its figures are batch sizes, of which the next larger one failed."""
        return self.unit == "batch"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One case."""

    case: str
    published: float | str
    emulated: float | str | None
    """None where it could not be emulated."""

    @property
    def error(self) -> float | None:
        """Emulated against published, as a share; None where one of the two is no figure."""
        if not isinstance(self.published, (int, float)) or not isinstance(self.emulated, (int, float)):
            return None
        return self.emulated / self.published - 1


def sources(only: Sequence[str] = ()) -> list[Source]:
    """Read what was published."""
    files = sorted(PUBLISHED.glob("*.json"))
    return [Source(name=one.stem, **json.loads(one.read_text())) for one in files if not only or one.stem in only]


def rebuild(source: Source) -> list[Compared]:
    """Run a source's function on its emulated card."""
    with tempfile.TemporaryDirectory(prefix="autobatch-rebuilt-") as folder:
        if source.packages:
            fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
            fetch += source.packages
            subprocess.run(fetch, check=True)
        paths = [folder, str(ROOT), str(ROOT / "server")]
        script = [str(Path(__file__).with_name("rebuilt.py")), source.rebuild["name"]]
        script.append(json.dumps(source.rebuild["arguments"]))
        ended = subprocess.run(
            [sys.executable, "-m", "autobatch", "emulate", source.emulated_card, "--", sys.executable, *script],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if ended.returncode != 0:
        print(f"{source.name}: {ended.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return [Compared(case=case, published=figure, emulated=None) for case, figure in source.figures.items()]
    found = json.loads(ended.stdout.splitlines()[-1])
    return [Compared(case=case, published=figure, emulated=found.get(case)) for case, figure in source.figures.items()]


def summary_rows(compared: dict[str, list[Compared]], named: dict[str, Source]) -> list[tuple[object, ...]]:
    """A row for each source of figures in bytes."""
    rows = []
    for name, cases in compared.items():
        errors = [abs(one.error) for one in cases if one.error is not None]
        if named[name].is_bracket or not errors:
            continue
        agreeing = sum((one.published == OOM) == (one.emulated == OOM) for one in cases if one.emulated is not None)
        signed = [one.error for one in cases if one.error is not None]
        rows.append(
            (
                named[name].group,
                named[name].card,
                len(cases),
                f"{statistics.median(errors):.2%}",
                f"{sorted(errors)[int(0.9 * (len(errors) - 1))]:.2%}" if len(errors) > 4 else "–",
                f"{max(signed, key=abs):+.2%}",
                f"{agreeing} of {len(cases)}",
            )
        )
    return rows


def text_of(compared: dict[str, list[Compared]], named: dict[str, Source]) -> str:
    """Everything in Markdown."""
    in_bytes = [one for name, cases in compared.items() if not named[name].is_bracket for one in cases]
    every = [one.error for one in in_bytes if one.error is not None]
    absolute = [abs(error) for error in every]
    parts = [
        "# Emulated against real cards",
        f"{machine()}. {_WHAT_IS_WHAT}",
    ]
    if every:
        within = sum(error <= 0.01 for error in absolute)
        parts.append(
            f"Peak memory, {len(every)} figures: median error {statistics.median(absolute):.2%}, {within} within 1 %, "
            f"worst {max(every, key=abs):+.1%}."
        )
        head = ("source", "card", "figures", "median error", "9 of 10 within", "worst", "fits or not, alike")
        parts += [markdown_table(head, summary_rows(compared, named)), "![Error by source](against_real.svg)"]
    for name, cases in compared.items():
        if named[name].is_bracket:
            parts.append(_bracket_text(named[name], cases))
    parts.append(f"Found and not rebuilt:\n\n{NOT_REBUILT}")
    parts.append("## Every case")
    for name, cases in compared.items():
        one = named[name]
        parts.append(
            f"### {one.group}\n\n{one.source}. {one.card}; {one.software}; {one.settings}. {one.quantity}, {one.unit}. "
            f"Emulated on {one.emulated_card}."
        )
        parts.append("\n".join(f"- Doubt: {doubt}." for doubt in one.doubts))
        parts.append(markdown_table(("case", "published", "emulated", "error"), [_case_row(each) for each in cases]))
    return "\n\n".join(parts)


def _case_row(one: Compared) -> tuple[object, ...]:
    def shown(value: float | str | None) -> str:
        return "not emulated" if value is None else value if isinstance(value, str) else f"{value:,.6g}"

    return one.case, shown(one.published), shown(one.emulated), "" if one.error is None else f"{one.error:+.2%}"


def _bracket_text(source: Source, cases: Sequence[Compared]) -> str:
    known = [one for one in cases if one.emulated is not None]
    same = sum(one.published == one.emulated for one in known)
    high = [one for one in known if one.error is not None and one.error > 0]
    low = [one for one in known if one.error is not None and one.error < 0]
    misses = "; ".join(f"{one.case}: {one.published} → {one.emulated}" for one in (*high, *low))
    left = ", ".join(one.case for one in cases if one.emulated is None)
    return (
        f"Fits or not, {source.group}: {same} of {len(known)} batch sizes the same, {len(high)} too high, {len(low)} too low. "
        f"Not the same: {misses or 'none'}." + (f" Not emulated: {left}." if left else "")
    )


def picture(compared: dict[str, list[Compared]], named: dict[str, Source]) -> Callable[[Axes], None]:
    """The error of each figure, a line for each source."""
    shown = [
        name for name in compared if not named[name].is_bracket and any(one.error is not None for one in compared[name])
    ]

    def paint(axes: Axes) -> None:
        for place, name in enumerate(shown):
            for one in compared[name]:
                if one.error is None:
                    continue
                beyond = abs(one.error) > 0.25
                axes.plot(
                    max(-0.25, min(0.25, one.error)),
                    place,
                    marker=("<" if one.error < 0 else ">") if beyond else "o",
                    markersize=5,
                    color=BAD if abs(one.error) > 0.05 else GOOD,
                    alpha=0.7,
                    markeredgewidth=0,
                )
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.axvspan(-0.01, 0.01, color="#d5e3ef", zorder=0)
        axes.set_yticks(range(len(shown)), [named[name].group for name in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(-0.27, 0.27)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:+.0%}")
        axes.set_xlabel("emulated against published; band: ±1 %; a triangle lies beyond the edge")

    return paint


def result(compared: dict[str, list[Compared]], named: dict[str, Source]) -> Result:
    """Put everything together."""
    errors = {name: [{**vars(one), "error": one.error} for one in cases] for name, cases in compared.items()}
    drawn = Picture(
        paint=picture(compared, named), title="Emulated peak memory against published figures", size=(8.5, 4.2)
    )
    return Result(
        name="against_real",
        data={"machine": machine(), "sources": errors},
        text=text_of(compared, named),
        pictures={"against_real": drawn},
    )


def main() -> int:
    """Compare, print, and keep it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_flags(parser)
    parser.add_argument("--only", nargs="*", default=(), metavar="NAME", help="sources, by their file's name")
    asked = parser.parse_args()
    named = {one.name: one for one in sources(QUICK if asked.quick else asked.only)}
    compared = {}
    for name, source in named.items():
        print(f"{name}: {len(source.figures)} figures …", file=sys.stderr, flush=True)
        compared[name] = rebuild(source)
    return finish(result(compared, named), asked)


if __name__ == "__main__":
    sys.exit(main())
