"""Start a user's command in the place of this program: its signals, its status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.cli.output import say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["run_to_end"]

# As shells and env(1) have it.
_NOT_FOUND = 127
_CANNOT_BE_RUN = 126


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end; its status, 127 where there is no such program, 126 where it cannot be run."""
    from autobatch.emulator.launch import run_command

    try:
        return run_command(command, environment)
    except OSError as error:
        say(f"cannot run {command[0]}: {error.strerror}")
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _CANNOT_BE_RUN
