"""`autobatch plan`: the arithmetic alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.flags import add_format_flag, add_option_flags, options_from
from autobatch.cli.output import write_json, write_plan, write_view
from autobatch.cli.settings import read_settings
from autobatch.errors import UsageError

if TYPE_CHECKING:
    import argparse

__all__ = ["add_commands"]

_FIELDS = ("target", "max_micro_batch", "world_size", "split", "tolerance", "multiple_of", "dataset_size")
# In a file this is where a probe is to stop, which says nothing of what fits.
_NOT_OF_THE_FILE = "max_micro_batch"
_DESCRIPTION = """\
Plan for a maximum that is known: no GPU is asked. What [tool.autobatch] of ./pyproject.toml says of the target, the
ranks and the split counts here too, under the flags."""


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="the arithmetic alone: target and maximum to sizes and steps",
        allow_abbrev=False,
        description=_DESCRIPTION,
    )
    add_option_flags(
        parser, _FIELDS, help_texts={"max_micro_batch": "largest micro-batch size that fits, as a probe found it"}
    )
    add_format_flag(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print the plan."""
    if parsed.command is not None:
        raise UsageError("autobatch plan takes no command after --")
    settings = read_settings(Path("pyproject.toml"))
    of_the_file = {
        name: settings.options[name] for name in _FIELDS if name in settings.options and name != _NOT_OF_THE_FILE
    }
    options = options_from(parsed, of_the_file)
    form = getattr(parsed, "format", None) or settings.form or "table"
    if options.max_micro_batch is None:
        raise UsageError("no maximum: give --max-micro-batch M, the largest micro-batch that fits")
    plan = options.make_plan(options.max_micro_batch)
    if form == "json":
        from autobatch.jsonform import to_json_form

        write_json(to_json_form(plan))
    elif form == "table":
        from autobatch.present.tables import plan_view

        write_view(plan_view(plan))
    else:
        write_plan(plan, form, notes=plan.warnings)
    return 0
