"""`autobatch cache`: what is remembered of earlier probes, and how to forget it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from autobatch.cli.output import say, write_json, write_view
from autobatch.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from autobatch.store import Measurement

__all__ = ["add_commands"]

_DESCRIPTION = """\
Look at the measurements that probes keep in this user's cache folder, or in the file that AUTOBATCH_CACHE names, or
forget them."""
_AGE = re.compile(r"([0-9]{1,6})([mhdw])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "cache", help="measurements that are remembered: list, forget", description=_DESCRIPTION, allow_abbrev=False
    )
    actions = parser.add_subparsers(title="what to do", metavar="ACTION", required=True)
    listing = actions.add_parser("ls", help="list them, the newest first", allow_abbrev=False)
    listing.add_argument("--format", choices=("table", "json"), default="table", help="how they are printed")
    listing.set_defaults(run=run_list, parser=listing)
    clearing = actions.add_parser("clear", help="forget them all, or those that are named", allow_abbrev=False)
    clearing.add_argument("id", nargs="*", metavar="ID", help="the measurements to forget, as `cache ls` names them")
    clearing.add_argument("--older-than", metavar="AGE", help="forget those that are older: 90m, 12h, 30d or 8w")
    clearing.add_argument("--job", metavar="NAME", help="forget those of a job, by its name or the beginning of it")
    clearing.set_defaults(run=run_clear, parser=clearing)


def run_list(parsed: argparse.Namespace) -> int:
    """List the measurements."""
    from autobatch.cache.remembered import opened_cache

    _refuse_command(parsed)
    with opened_cache() as cache:
        entries, path = cache.entries(), cache.path
    if parsed.format == "json":
        write_json([_form(entry) for entry in entries])
    elif entries:
        from autobatch.present.inventory import measurements_view

        write_view(measurements_view(entries))
    else:
        say(f"nothing is remembered in {path}")
    return 0


def _form(entry: Measurement) -> dict[str, object]:
    report = entry.report
    return {
        "id": entry.id,
        "job": entry.workload,
        "gpu": entry.gpu,
        "basis": report.basis,
        "measured_at": report.measured_at,
        "max_micro_batch_size": report.max_micro_batch_size,
        "num_trials": len(report.trials),
        "torch": report.versions.torch,
        "files": sorted(entry.origin.sources) if entry.origin else [],
    }


def run_clear(parsed: argparse.Namespace) -> int:
    """Forget measurements."""
    from autobatch.cache.remembered import clear_all, opened_cache

    _refuse_command(parsed)
    if parsed.job is not None and not parsed.job:
        raise UsageError("--job '' names no job: leave it out to forget them all")
    older_than = None if parsed.older_than is None else _read_age(parsed.older_than)
    if not (parsed.id or parsed.job or older_than is not None):
        say(f"the cache {clear_all()} is empty now")
        return 0
    with opened_cache() as cache:
        entries = cache.entries()
        if missing := sorted(set(parsed.id) - {entry.id for entry in entries}):
            raise UsageError(f"there is no measurement {missing[0]}: `autobatch cache ls` lists them")
        gone = cache.forget([entry.id for entry in _chosen(entries, parsed, older_than)])
    hint = "" if gone or parsed.job is None else f": no job's name begins with {parsed.job!r}, see `autobatch cache ls`"
    say(f"{gone} of {len(entries)} measurements forgotten{hint}")
    return 0


def _chosen(
    entries: Sequence[Measurement], parsed: argparse.Namespace, older_than: float | None
) -> Iterator[Measurement]:
    """Those to which all that is said applies."""
    import time

    now = time.time()
    for entry in entries:
        named = not parsed.id or entry.id in parsed.id
        of_job = parsed.job is None or entry.workload.startswith(parsed.job)
        old = older_than is None or now - entry.created_at > older_than
        if named and of_job and old:
            yield entry


def _read_age(text: str) -> float:
    match = _AGE.fullmatch(text)
    if match is None:
        raise UsageError(f"--older-than {text!r} is no age: write a number and m, h, d or w, as in 30d")
    return float(int(match[1]) * _SECONDS[match[2]])


def _refuse_command(parsed: argparse.Namespace) -> None:
    if parsed.command is not None:
        raise UsageError("autobatch cache takes no command after --")
