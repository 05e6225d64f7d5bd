"""Recordings of a real card against the same on an emulated one, trial by trial.

    python tests/benchmarks/against_card.py [FOLDER …] [--write]

Each folder under `tests/data/real/` but `published` holds what `tests/gpu/run.sh` recorded on one card. Held side by side are the
peaks of trials with the same sizes, whether they fitted, the largest sizes, what lies outside the allocator, each size that the
allocator was asked for, and what cuDNN takes beside inputs and outputs. No figure is left out because it does not agree.
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "gpu")]

from recordings import KEPT, read_recording
from results import BAD, GOOD, MUTED, Picture, Result, add_flags, finish, markdown_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from matplotlib.axes import Axes

QUANTITIES = ("peak_allocated_bytes", "peak_reserved_bytes", "footprint_bytes")
CONVOLUTIONAL = ("resnet", "convnext", "mobilenet", "mnasnet", "efficientnet", "unet")
FAMILIES = ("language models and transformers", "convolutional nets")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One trial on the card and the same one on the emulated card."""

    setting: str
    family: str
    cap: str
    """`curve` for those without one."""
    size: int
    measured: Mapping[str, Any]
    emulated: Mapping[str, Any]

    @property
    def both_fit(self) -> bool:
        return bool(self.measured["outcome"] == self.emulated["outcome"] == "fits")

    @property
    def agrees(self) -> bool:
        """Whether both fit, or neither does."""
        return bool((self.measured["outcome"] == "fits") == (self.emulated["outcome"] == "fits"))

    def error(self, quantity: str) -> float:
        """Emulated against measured, as a share."""
        return float(self.emulated[quantity] / self.measured[quantity] - 1)


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest sizes under one cap."""

    setting: str
    cap: str
    measured: int | None
    emulated: int | None


@dataclass(kw_only=True)
class Comparison:
    """All that was recorded of one card, beside the same of its emulation."""

    card: str
    machines: tuple[Mapping[str, Any], Mapping[str, Any]]
    """Of the recording, and of its emulation."""
    pairs: list[Pair] = field(default_factory=list)
    largest: list[Largest] = field(default_factory=list)
    contexts: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Setting, moment, bytes outside the allocator on the card, and on the emulated one."""
    traces: list[tuple[str, int, dict[int, int]]] = field(default_factory=list)
    """Setting, size, and by bytes how often the card's allocator was asked more often than the emulated one's."""
    workspaces: list[tuple[tuple[Any, ...], list[int | str], list[int | str]]] = field(default_factory=list)
    """Of a convolution's operation: its key, and bytes of the blocks beside its results, or its error, on either side."""
    missing: Sequence[str] = ()

    @property
    def is_rehearsal(self) -> bool:
        """Whether the card itself was an emulated one."""
        return bool(self.machines[0].get("basis") != "measured")

    @property
    def agreement(self) -> float:
        """Share of the trials that fit on both or on neither."""
        return sum(pair.agrees for pair in self.pairs) / len(self.pairs) if self.pairs else 1.0

    def errors(self, family: str, quantity: str) -> list[float]:
        """Of the trials that fit on both."""
        return [pair.error(quantity) for pair in self.pairs if pair.family == family and pair.both_fit]


def compare(folder: Path) -> Comparison:
    """Read a folder of recordings and hold both sides against each other."""
    measured = read_recording(folder / "fidelity.json.gz")
    emulated = read_recording(folder / "fidelity-emulated.json.gz")
    found = Comparison(
        card=measured["machine"]["card"],
        machines=(measured["machine"], emulated["machine"]),
        missing=measured.get("missing", ()),
    )
    others = {_setting(one): one for one in emulated["settings"]}
    for one in measured["settings"]:
        name = _setting(one)
        if name not in others:
            found.missing = [*found.missing, f"{name}: not emulated"]
            continue
        _compare_setting(found, one, others[name], measured["columns"])
    if (folder / "workspaces.json.gz").exists() and (folder / "workspaces-emulated.json.gz").exists():
        sides = [
            read_recording(folder / name)["rows"] for name in ("workspaces.json.gz", "workspaces-emulated.json.gz")
        ]
        again = {tuple(row[:6]): row for row in sides[1]}
        rows = [(row, again[tuple(row[:6])]) for row in sides[0] if tuple(row[:6]) in again]
        found.workspaces = [(tuple(row[:6]), row[7], other[7]) for row, other in rows]
    return found


def _setting(one: Mapping[str, Any]) -> str:
    return f"{one['workload']}, {one['precision']}, {one['allocator']}"


def _compare_setting(
    found: Comparison, one: Mapping[str, Any], other: Mapping[str, Any], columns: Sequence[str]
) -> None:
    name = _setting(one)
    curves = [side.get("curve", {"rows": ()})["rows"] for side in (one, other)]
    found.pairs += _pairs(name, "curve", columns, *curves)
    caps = {each["cap"]: each for each in other["caps"]}
    for each in one["caps"]:
        again = caps.get(each["cap"], {"rows": (), "is_certified": False})
        found.pairs += _pairs(name, each["cap"], columns, each["rows"], again["rows"])
        if each["is_certified"] and again["is_certified"]:
            found.largest.append(
                Largest(setting=name, cap=each["cap"], measured=each["largest"], emulated=again["largest"])
            )
    for reading, again in zip(one.get("context", ()), other.get("context", ()), strict=False):
        if "cuda_free_bytes" in reading and "cuda_free_bytes" in again:
            outside = [_outside(side, found.machines[place]) for place, side in enumerate((reading, again))]
            found.contexts.append((name, reading["moment"], outside[0], outside[1]))
    for trace, again in zip(one.get("traces", ()), other.get("traces", ()), strict=False):
        counts = [_asked(side["events"]) for side in (trace, again)]
        more = {size: counts[0][size] - counts[1][size] for size in counts[0] | counts[1]}
        found.traces.append((name, trace["micro_batch_size"], {size: n for size, n in more.items() if n}))


def _pairs(
    setting: str, cap: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]]
) -> Iterator[Pair]:
    """Each trial of one side with that of the same size on the other."""
    family = FAMILIES[any(word in setting for word in CONVOLUTIONAL)]
    again = {row[0]: dict(zip(columns, row, strict=True)) for row in others}
    for row in rows:
        if row[0] in again:
            trial = dict(zip(columns, row, strict=True))
            yield Pair(setting=setting, family=family, cap=cap, size=row[0], measured=trial, emulated=again[row[0]])


def _outside(reading: Mapping[str, Any], machine: Mapping[str, Any]) -> int:
    """Bytes in use on the card beside what the allocator reserved."""
    return int(machine["cuda_total_bytes"] - reading["cuda_free_bytes"] - reading["reserved_bytes"])


def _asked(events: Sequence[Sequence[Any]]) -> collections.Counter[int]:
    return collections.Counter(size for action, size in events if action == "alloc")


def spread(errors: Sequence[float]) -> tuple[str, str, str]:
    """Median and ninth decile of the errors' sizes, and the worst with its sign."""
    sizes = sorted(abs(error) for error in errors)
    if not sizes:
        return "–", "–", "–"
    return (
        f"{statistics.median(sizes):.2%}",
        f"{sizes[int(0.9 * (len(sizes) - 1))]:.2%}",
        f"{max(errors, key=abs):+.2%}",
    )


def text_of(found: Comparison) -> str:
    """One card in Markdown."""
    here, there = found.machines
    what = "REHEARSAL: both sides are emulated" if found.is_rehearsal else f"{here['card']}, driver {here['driver']}"
    parts = [
        f"## {found.card}",
        f"{what}; torch {here['torch']}, cuDNN {here['cudnn']}; emulated with torch {there['torch']}, cuDNN {there['cudnn']}.",
        f"{len(found.pairs)} trials side by side; {found.agreement:.1%} fit on both or on neither.",
    ]
    rows = []
    for family in FAMILIES:
        for quantity in QUANTITIES:
            errors = found.errors(family, quantity)
            if errors:
                words = quantity.removesuffix("_bytes").replace("_", " ")
                rows.append((family, words, len(errors), *spread(errors)))
    parts.append(markdown_table(("", "", "trials", "median error", "9 of 10 within", "worst"), rows))
    same = sum(one.measured == one.emulated for one in found.largest)
    misses = [
        f"{one.setting}, cap {one.cap}: {one.measured} → {one.emulated}"
        for one in found.largest
        if one.measured != one.emulated
    ]
    parts.append(
        f"The largest size is the same in {same} of {len(found.largest)}. Not the same: {'; '.join(misses) or 'none'}."
    )
    parts.append("Outside the allocator, bytes on the card and emulated:")
    parts.append(markdown_table(("setting", "moment", "card", "emulated"), _contexts(found)))
    parts.append(_trace_text(found))
    parts.append(_workspace_text(found))
    if found.missing:
        parts.append("Not recorded:\n\n" + "\n".join(f"- {line}" for line in found.missing))
    return "\n\n".join(part for part in parts if part)


def _contexts(found: Comparison) -> list[tuple[object, ...]]:
    return [(name, moment, f"{one:,}", f"{other:,}") for name, moment, one, other in found.contexts]


def _trace_text(found: Comparison) -> str:
    lines = []
    for name, size, more in found.traces:
        shown = sorted(more.items(), key=lambda item: -abs(item[0] * item[1]))[:8]
        lines.append(f"- {name}, {size}: " + (", ".join(f"{n:+} × {asked:,}" for asked, n in shown) or "the same"))
    return (
        "Blocks that the card's allocator was asked for more often than the emulated one's:\n\n" + "\n".join(lines)
        if lines
        else ""
    )


def _workspace_text(found: Comparison) -> str:
    if not found.workspaces:
        return ""
    groups: dict[tuple[str, ...], list[tuple[int | None, int | None]]] = collections.defaultdict(list)
    for (_, _, dtype, layout, benchmark, operation), one, other in found.workspaces:
        mode = "benchmark" if benchmark else "heuristics"
        groups[operation, dtype, f"channels {layout}", mode].append((_taken(one), _taken(other)))
    rows = []
    for group, sums in sorted(groups.items()):
        rows.append(
            (
                ", ".join(group),
                len(sums),
                f"{sum(one == other for one, other in sums) / len(sums):.0%}",
                *(_median([side for side in sides if side is not None]) for sides in zip(*sums, strict=True)),
                f"{max((abs(one - other) for one, other in sums if one is not None and other is not None), default=0):,}",
            )
        )
    head = ("operation", "cases", "the same", "median bytes, card", "emulated", "worst difference")
    return "Blocks beside results, by operation:\n\n" + markdown_table(head, rows)


def _taken(blocks: Sequence[int | str]) -> int | None:
    """Bytes of an operation's blocks; None where it failed."""
    sizes = [each for each in blocks if isinstance(each, int)]
    return sum(sizes) if len(sizes) == len(blocks) else None


def _median(sizes: Sequence[int]) -> str:
    return f"{statistics.median(sizes):,.0f}" if sizes else "failed"


def picture(found: Sequence[Comparison]) -> Callable[[Axes], None]:
    """The error of each trial's footprint, a line for each setting."""
    names = sorted({pair.setting for one in found for pair in one.pairs})

    def paint(axes: Axes) -> None:
        for one in found:
            for pair in one.pairs:
                if not pair.both_fit:
                    continue
                error = pair.error("footprint_bytes")
                axes.plot(
                    max(-0.1, min(0.1, error)),
                    names.index(pair.setting),
                    marker="o" if abs(error) <= 0.1 else "<" if error < 0 else ">",
                    markersize=4,
                    color=BAD if abs(error) > 0.01 else GOOD,
                    alpha=0.6,
                    markeredgewidth=0,
                )
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.axvspan(-0.01, 0.01, color="#d5e3ef", zorder=0)
        axes.set_yticks(range(len(names)), [re.sub(r"\?[^,]*", "", name) for name in names])  # without parameters
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.105, 0.105)
        axes.set_xticks([-0.1, -0.05, 0.0, 0.05, 0.1])
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:+.0%}")
        axes.set_xlabel("emulated against the card; band: ±1 %; a triangle lies beyond the edge")

    return paint


def result(found: Sequence[Comparison]) -> Result:
    """Put everything together."""
    data = [
        {
            "card": one.card,
            "machines": one.machines,
            "agreement": one.agreement,
            "errors": {family: {each: one.errors(family, each) for each in QUANTITIES} for family in FAMILIES},
            "largest": [asdict(each) for each in one.largest],
        }
        for one in found
    ]
    drawn = Picture(paint=picture(found), title="Emulated footprint against cards", size=(8.5, 4.8))
    head = "# Emulated against cards that were recorded\n\n![Error of each trial](against_card.svg)"
    return Result(
        name="against_card",
        data=data,
        text="\n\n".join([head, *map(text_of, found)]),
        pictures={"against_card": drawn},
    )


def folders() -> list[Path]:
    """The cards that were recorded."""
    return sorted(path.parent for path in KEPT.glob("*/fidelity-emulated.json.gz"))


def main() -> int:
    """Compare, print, and keep it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_flags(parser)
    parser.add_argument(
        "folder", type=Path, nargs="*", help="recordings; those under tests/data/real where none is given"
    )
    asked = parser.parse_args()
    found = [compare(folder) for folder in asked.folder or folders()]
    if not found:
        print("no card has been recorded yet: run tests/gpu/run.sh on a machine with one", file=sys.stderr)
        return 0
    return finish(result(found), asked)


if __name__ == "__main__":
    sys.exit(main())
