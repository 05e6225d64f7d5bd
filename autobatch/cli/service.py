"""`autobatch serve` and `autobatch token`: handed on to the service's own package, which is imported on use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "add_commands", "run"]

COMMANDS = {
    "serve": "the REST service that job schedulers query",
    "token": "make, list and revoke the service's tokens",
}
"""The commands that take their own arguments, each with its help."""


def add_commands(commands: Any) -> None:
    """Name the commands in the parser's help; their arguments are parsed by the service's package."""
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)


def run(words: Sequence[str]) -> int:
    """Run one of the commands.

    Raises:
        UnavailableError: the service's packages are not installed.
        AutobatchError: the command failed.
    """
    try:
        from autobatch_server import commands
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"the service needs {error.name}, which is not installed: pip install '.[server]' in autobatch's own folder"
        ) from None
    return commands.main(words)
