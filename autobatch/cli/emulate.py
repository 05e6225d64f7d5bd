"""`autobatch emulate`: any program on an emulated card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError

if TYPE_CHECKING:
    import argparse

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "emulate",
        help="run any program on an emulated card",
        allow_abbrev=False,
        usage="autobatch emulate GPU[,GPU…] [--tenant BYTES] -- COMMAND…",
        description="Run COMMAND with emulated cards: torch's CUDA build works, kernels compute nothing, memory is kept "
        "as on the card. Signals and the exit status pass through.",
    )
    parser.add_argument("cards", metavar="GPU[,GPU…]", help="cards as `autobatch gpus` names them")
    parser.add_argument("--tenant", default="0", metavar="BYTES", help="memory that another tenant holds on each card")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command and end as it does; with 127 where there is no such program, with 126 where it cannot be run."""
    from autobatch.cli.started import run_to_end
    from autobatch.emulator.launch import open_machine
    from autobatch.units import parse_bytes

    if not parsed.command:
        raise UsageError("no command: write autobatch emulate GPU -- COMMAND")
    names = [name for name in parsed.cards.split(",") if name.strip()]
    if not names:
        raise UsageError(
            f"{parsed.cards!r} names no card: write one or several, such as T4,T4 (`autobatch gpus` lists them)"
        )
    with open_machine(names, tenant_bytes=parse_bytes(parsed.tenant, name="tenant")) as machine:
        return run_to_end(parsed.command, machine.environment())
