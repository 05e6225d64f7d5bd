"""Flags made from the fields of `ProbeOptions`, so that every face has the same knobs."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError
from autobatch.options import ProbeOptions
from autobatch.present.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["add_format_flag", "add_option_flags", "default_text", "flag_of", "options_from"]

_UNSET = argparse.SUPPRESS


def flag_of(field_name: str) -> str:
    """The flag of a field: `--max-micro-batch` for `max_micro_batch`."""
    return "--" + field_name.replace("_", "-")


def default_text(field: dataclasses.Field[Any]) -> str:
    """Write a field's default as a person would: `0%`, `600 s`; empty where it has none."""
    default = field.default
    if default is None or default is dataclasses.MISSING:
        return ""
    if isinstance(default, float):
        return f"{default:g} s" if field.metadata["form"] == "SECONDS" else f"{default * 100:g}%"
    return str(default)


def add_option_flags(
    parser: argparse.ArgumentParser,
    names: Iterable[str] | None = None,
    *,
    help_texts: Mapping[str, str] | None = None,
) -> None:
    """Add a flag for each field of `ProbeOptions`, or for those named.

    Flags that are not given leave no attribute, so that a file's settings show through.

    Args:
        parser: what they are added to.
        names: the fields; None for all.
        help_texts: what a field means to this command, where that is not what it means to a probe.
    """
    wanted = None if names is None else set(names)
    for field in dataclasses.fields(ProbeOptions):
        if wanted is not None and field.name not in wanted:
            continue
        knob = field.metadata
        text = (help_texts or {}).get(field.name, knob["help"])
        default = default_text(field)
        parser.add_argument(
            flag_of(field.name),
            dest=field.name,
            type=_reader(str(field.type)),
            choices=knob["choices"] or None,
            metavar=None if knob["choices"] else knob["form"],
            default=_UNSET,
            # Help is a %-format, in which %(prog)s may stand; the name of a value is not.
            help=(f"{text} (default {default})" if default else text).replace("%", "%%"),
        )


def add_format_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--format`, which a file's setting shows through where it is not given."""
    parser.add_argument("--format", choices=FORMATS, default=_UNSET, help="how the plan is printed (default table)")


def options_from(parsed: argparse.Namespace, settings: Mapping[str, object]) -> ProbeOptions:
    """Make the options of a command line over those of a file.

    Raises:
        UsageError: a value is out of range, or the target is missing.
    """
    names = [field.name for field in dataclasses.fields(ProbeOptions)]
    values: dict[str, Any] = {name: settings[name] for name in names if name in settings}
    values |= {name: getattr(parsed, name) for name in names if hasattr(parsed, name)}
    if "target" not in values:
        raise UsageError("no target: give --target N, the samples of one optimizer step over all ranks")
    return ProbeOptions(**values)


def _reader(annotation: str) -> Any:
    """What reads a flag's text: whole numbers and seconds here, sizes and shares in `ProbeOptions` itself."""
    if annotation.startswith("int"):
        return _whole_number
    if annotation.startswith("float"):
        return _seconds
    return str


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _seconds(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, nor none for no limit") from None
