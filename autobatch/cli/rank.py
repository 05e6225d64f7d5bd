"""`autobatch rank`: which cards fit, and with what plan."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.flags import add_option_flags, flag_of, options_from
from autobatch.cli.output import error_console, say, write_json, write_plan, write_text, write_view
from autobatch.cli.probe import Subject, add_command_flags
from autobatch.cli.settings import read_settings
from autobatch.errors import NothingFitsError, PlanError, UnavailableError, UsageError
from autobatch.placement import RANK_BY, Candidate, parse_candidate, parse_price
from autobatch.present.formats import (
    FORMATS,
    PLACEMENT_FORMS,
    PROLOG_FORM,
    SUBMISSION_FORMS,
    placement_as_arguments,
    placement_as_environment,
    plan_as_prolog,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autobatch.cli.settings import Settings
    from autobatch.placement import PlacementTable, RankBy

__all__ = ["add_commands"]

# A ranking emulates every card, and asks of each how many ranks it would have.
_FIELDS = (
    *("target", "headroom", "split", "tolerance", "multiple_of", "max_micro_batch", "objective", "dataset_size"),
    *("min_windows", "trial_timeout", "deadline"),
)
# What a service is asked of them.
_ASKED = ("target", "split")
_DESCRIPTION = """\
Rank cards for a training job by emulating each: which fit, with what plan, and what each leaves. WORKLOAD and a command behind
-- are what they are to `autobatch probe`; a command is started anew for each trial on each card. Without --gpu, one of each
card of the catalogue. With --from nothing is probed: a service says what it knows.

Where one fits, the forms other than table and json are of the first: its plan as `autobatch probe` writes it, or its cards
for sbatch, by the type of their gres (slurm) or by a feature of their nodes (slurm:constraint). sbatch and sbatch:constraint are
lines for a shell to evaluate before sbatch: the plan and the cards in one. slurm:prolog is the plan as a TaskProlog prints it."""


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
        help="the fewest cards (then cost, then headroom), the lowest cost, the most headroom, or with --from the most samples "
        "in a second; cost where prices are given, else gpus",
    )
    add_option_flags(parser, _FIELDS)
    parser.add_argument(
        "--from",
        dest="service",
        metavar="URL",
        help="ask the service there instead of probing; a token comes from AUTOBATCH_TOKEN",
    )
    parser.add_argument(
        "--format",
        choices=(*FORMATS, *PLACEMENT_FORMS, PROLOG_FORM, *SUBMISSION_FORMS),
        default="table",
        help="how the result is printed",
    )
    parser.add_argument(
        "--type",
        action="append",
        default=[],
        metavar="NAME=TYPE",
        help="what Slurm calls a card here, for --format slurm (default: what AutoDetect=nvml calls it); again for each",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the cards into a .png, .svg or .pdf (needs matplotlib)")
    add_command_flags(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Rank, and print the result."""
    settings = read_settings(Path("pyproject.toml"))
    parsed.verbose = getattr(parsed, "verbose", settings.verbose or False)
    candidates = _candidates(parsed.gpu, parsed.price)
    types = _types(parsed.type, candidates)
    plot = _checked_plot(parsed.plot)
    if parsed.rank_by == "cost" and not parsed.price:
        raise UsageError("--rank-by cost needs prices: give --price NAME=PRICE for each card, such as --price L4=0.60")
    if parsed.rank_by == "throughput" and parsed.service is None:
        raise UsageError(
            "--rank-by throughput needs times, and an emulated card has none: give --from URL, a service with them"
        )
    rank_by: RankBy = parsed.rank_by or ("cost" if parsed.price else "gpus")
    rank_here_or_ask = _rank_here if parsed.service is None else _ask
    table = rank_here_or_ask(parsed, settings, candidates, rank_by)
    _print(table, parsed.format, types)
    if plot is not None:
        from autobatch.present.plot import draw_placements

        draw_placements(table, plot)
        say(f"plot written to {plot}")
    _check_that_one_fits(table, parsed.service)
    return 0


def _rank_here(
    parsed: argparse.Namespace, settings: Settings, candidates: list[Candidate], rank_by: RankBy
) -> PlacementTable:
    """Probe on every card, emulated."""
    from autobatch.present.progress import RankingLines
    from autobatch.ranking import placements

    subject = Subject.read(parsed, settings)
    if subject.lengths:
        raise UsageError(
            f"--sizes {parsed.sizes} asks for a plan for each length: rank at one length, as gpt2?seq_len=512"
        )
    options = options_from(parsed, _of_the_file(settings))
    with RankingLines(error_console(), live=not parsed.verbose) as progress:
        return placements(
            subject.workload if subject.command is None else subject.command,
            candidates=candidates,
            rank_by=rank_by,
            edits=subject.edits,
            progress=progress,
            show_output=parsed.verbose,
            cache=subject.cache,
            **{name: getattr(options, name) for name in _FIELDS},
        )


def _ask(
    parsed: argparse.Namespace, settings: Settings, candidates: list[Candidate], rank_by: RankBy
) -> PlacementTable:
    """Ask a service, which answers from what was measured."""
    from autobatch.placing import ask_placements

    if parsed.command is not None or parsed.workload is None:
        raise UsageError("--from asks a service: name the training job as it is known there, such as gpt2?seq_len=512")
    given = [flag_of(name) for name in _FIELDS if name not in _ASKED and hasattr(parsed, name)]
    given += ["--sizes"] * (parsed.sizes is not None) + ["--set"] * bool(parsed.set)
    given += ["--cache"] * hasattr(parsed, "cache")
    if given:
        raise UsageError(f"{given[0]} is for a probe, and --from asks for what was measured: leave one of them out")
    if parsed.plot is not None:
        raise UsageError("--plot draws what a probe measures here: leave --from out, or look at the service's page")
    options = options_from(parsed, {name: value for name, value in _of_the_file(settings).items() if name in _ASKED})
    return ask_placements(
        url=parsed.service,
        token=os.environ.get("AUTOBATCH_TOKEN") or None,
        workload=parsed.workload,
        target=options.target,
        split=options.split,
        candidates=candidates,
        rank_by=rank_by,
    )


def _of_the_file(settings: Settings) -> dict[str, object]:
    return {name: value for name, value in settings.options.items() if name in _FIELDS}


def _check_that_one_fits(table: PlacementTable, service: str | None) -> None:
    """End as one who asked for cards expects where none fits."""
    verdicts = {one.verdict for one in table.placements}
    if "fits" in verdicts:
        return
    if "does_not_fit" in verdicts:
        raise NothingFitsError(_why_none(table))
    if service is not None and "unknown" in verdicts:
        raise UnavailableError(
            f"the service at {service} has no measurement that answers for {table.workload}: probe it there, or with "
            f"`autobatch probe … --report-to {service}`"
        )
    raise PlanError(
        f"{table.workload}: the target cannot be split over any of the candidates: the table says why of each"
    )


def _candidates(gpus: Sequence[str], prices: Sequence[str]) -> list[Candidate]:
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


def _types(given: Sequence[str], candidates: Sequence[Candidate]) -> dict[str, str]:
    """Read what Slurm calls the cards, by their names in the catalogue.

    Raises:
        UsageError: one is malformed, or of a card that is not ranked.
    """
    from autobatch.gpu.catalogue import find_card

    types = {}
    for text in given:
        name, equals, kind = text.partition("=")
        if not equals or not kind.strip():
            raise UsageError(f"--type {text!r} is not a card and its type: write L4=l4")
        card = find_card(name).name
        if card not in {one.gpu for one in candidates}:
            raise UsageError(f"--type {text} is of a card that is not ranked: add --gpu {card}")
        types[card] = kind.strip()
    return types


def _checked_plot(path: str | None) -> Path | None:
    if path is None:
        return None
    from autobatch.present.plot import check_plot_path

    check_plot_path(path)
    return Path(path)


def _print(table: PlacementTable, form: str, types: Mapping[str, str]) -> None:
    if form == "json":
        from autobatch.jsonform import to_json_form

        write_json(to_json_form(table))
        return
    if form == "table":
        from autobatch.present.placements import placements_view

        write_view(placements_view(table))
        return
    best = next((one for one in table.placements if one.verdict == "fits"), None)
    if best is None:
        return  # said as an error
    if form in PLACEMENT_FORMS:
        write_text(placement_as_arguments(best, form, type_name=types.get(best.gpu)))
        return
    if best.plan is None:
        raise PlanError(f"{best.gpu}: {best.reason}")
    if form in SUBMISSION_FORMS or form == PROLOG_FORM:
        for note in best.plan.warnings:
            say(f"note: {note}")
    if form in SUBMISSION_FORMS:
        name = types.get(best.gpu)
        write_text(placement_as_environment(best, best.plan, form, workload=table.workload, type_name=name))
        return
    if form == PROLOG_FORM:
        write_text(plan_as_prolog(best.plan, basis=best.basis, measurement=best.measurement))
        return
    write_plan(best.plan, form, basis=best.basis, measurement=best.measurement, notes=best.plan.warnings)


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
