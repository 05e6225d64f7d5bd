"""`autobatch rank`: which cards fit, and with what plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.flags import add_option_flags, options_from
from autobatch.cli.output import error_console, say, write_json, write_view
from autobatch.cli.probe import Subject, add_command_flags
from autobatch.cli.settings import read_settings
from autobatch.errors import NothingFitsError, PlanError, UsageError
from autobatch.placement import RANK_BY, Candidate, parse_candidate, parse_price

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.placement import PlacementTable, RankBy

__all__ = ["add_commands"]

# A ranking emulates every card, and asks of each how many ranks it would have.
_FIELDS = (
    *("target", "headroom", "split", "tolerance", "multiple_of", "max_micro_batch", "objective", "dataset_size"),
    *("min_windows", "trial_timeout", "deadline"),
)
_DESCRIPTION = """\
Rank cards for a training job by emulating each: which fit, with what plan, and what each leaves. WORKLOAD and a command behind
-- are what they are to `autobatch probe`; a command is started anew for each trial on each card. Without --gpu, one of each
card of the catalogue."""


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "rank",
        help="which cards fit, and with what plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workload", nargs="?", metavar="WORKLOAD", help="the training job")
    parser.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="NAME[:COUNT]",
        help="a card, or so many of it; again for each",
    )
    parser.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="NAME=PRICE",
        help="what one such card costs for an hour, in any currency; again for each",
    )
    parser.add_argument(
        "--rank-by",
        choices=RANK_BY,
        help="the fewest cards (then cost, then headroom), the lowest cost, or the most headroom; cost where prices are given, "
        "else gpus",
    )
    add_option_flags(parser, _FIELDS)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="how the result is printed")
    parser.add_argument("--plot", metavar="FILE", help="draw the cards into a .png, .svg or .pdf (needs matplotlib)")
    add_command_flags(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Rank, and print the result."""
    from autobatch.present.progress import RankingLines
    from autobatch.ranking import placements

    settings = read_settings(Path("pyproject.toml"))
    parsed.verbose = getattr(parsed, "verbose", settings.verbose or False)
    subject = Subject.read(parsed, settings)
    if subject.lengths:
        raise UsageError(
            f"--sizes {parsed.sizes} asks for a plan for each length: rank at one length, as gpt2?seq_len=512"
        )
    of_the_file = {name: value for name, value in settings.options.items() if name in _FIELDS}
    options = options_from(parsed, of_the_file)
    candidates = _candidates(parsed.gpu, parsed.price)
    plot = _checked_plot(parsed.plot)
    if parsed.rank_by == "cost" and not parsed.price:
        raise UsageError("--rank-by cost needs prices: give --price NAME=PRICE for each card, such as --price L4=0.60")
    rank_by: RankBy = parsed.rank_by or ("cost" if parsed.price else "gpus")
    with RankingLines(error_console(), live=not parsed.verbose) as progress:
        table = placements(
            subject.workload if subject.command is None else subject.command,
            candidates=candidates,
            rank_by=rank_by,
            edits=subject.edits,
            progress=progress,
            show_output=parsed.verbose,
            cache=subject.cache,
            **{name: getattr(options, name) for name in _FIELDS},
        )
    _print(table, parsed.format)
    if plot is not None:
        from autobatch.present.plot import draw_placements

        draw_placements(table, plot)
        say(f"plot written to {plot}")
    verdicts = {one.verdict for one in table.placements}
    if "fits" in verdicts:
        return 0
    if "does_not_fit" in verdicts:
        raise NothingFitsError(_why_none(table))
    raise PlanError(
        f"{table.workload}: the target cannot be split over any of the candidates: the table says why of each"
    )


def _candidates(gpus: Sequence[str], prices: Sequence[str]) -> list[Candidate] | None:
    """Read the cards and their prices, by any of their names.

    Raises:
        UsageError: one is malformed or no card, or a price is of a card that is not ranked.
    """
    import dataclasses

    from autobatch.gpu.catalogue import find_card, load_catalogue

    named = [parse_candidate(text) for text in gpus] or [Candidate(gpu=card.name) for card in load_catalogue()]
    found = [dataclasses.replace(one, gpu=find_card(one.gpu).name) for one in named]
    priced = {find_card(name).name: price for name, price in map(parse_price, prices)}
    ranked = {one.gpu for one in found}
    if left_over := sorted(set(priced) - ranked):
        raise UsageError(f"--price {left_over[0]} is of a card that is not ranked: add --gpu {left_over[0]}")
    return [dataclasses.replace(one, price_per_hour=priced.get(one.gpu)) for one in found]


def _checked_plot(path: str | None) -> Path | None:
    if path is None:
        return None
    from autobatch.present.plot import check_plot_path

    check_plot_path(path)
    return Path(path)


def _print(table: PlacementTable, form: str) -> None:
    if form == "json":
        from autobatch.jsonform import to_json_form

        write_json(to_json_form(table))
        return
    from autobatch.present.placements import placements_view

    write_view(placements_view(table))


def _why_none(table: PlacementTable) -> str:
    nearest = min(
        (one for one in table.placements if one.missing_bytes is not None),
        key=lambda one: one.missing_bytes or 0,
        default=None,
    )
    if nearest is None:
        return f"{table.workload} fits none of {len(table.placements)} candidates: the table says why of each"
    from autobatch.units import format_bytes

    return (
        f"{table.workload} fits none of {len(table.placements)} candidates; {nearest.gpu} comes nearest, and lacks about "
        f"{format_bytes(nearest.missing_bytes or 0)}"
    )
