"""`autobatch plan`: the arithmetic alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch.cli.flags import add_option_flags, options_from
from autobatch.cli.output import write_json, write_plan, write_view
from autobatch.errors import UsageError
from autobatch.present.formats import FORMATS

if TYPE_CHECKING:
    import argparse

__all__ = ["add_commands"]

_FIELDS = ("target", "max_micro_batch", "world_size", "split", "tolerance", "multiple_of", "dataset_size")


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="the arithmetic alone: target and maximum to sizes and steps",
        allow_abbrev=False,
        description="Plan for a maximum that is known: no GPU is asked.",
    )
    add_option_flags(parser, _FIELDS)
    parser.add_argument("--format", choices=FORMATS, default="table", help="how the plan is printed (default table)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print the plan."""
    if parsed.command is not None:
        raise UsageError("autobatch plan takes no command after --")
    options = options_from(parsed, {})
    if options.max_micro_batch is None:
        raise UsageError("no maximum: give --max-micro-batch M, the largest micro-batch that fits")
    plan = options.make_plan(options.max_micro_batch)
    if parsed.format == "json":
        from autobatch.jsonform import to_json_form

        write_json(to_json_form(plan))
    elif parsed.format == "table":
        from autobatch.present.tables import plan_view

        write_view(plan_view(plan))
    else:
        write_plan(plan, parsed.format)
    return 0
