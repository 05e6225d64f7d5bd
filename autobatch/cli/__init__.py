"""The command line: `autobatch probe`, `run`, `plan`, `check`, `emulate`, `gpus`, `doctor`, and the service's commands."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from autobatch._version import __version__
from autobatch.cli import service
from autobatch.cli.output import say, silence_output
from autobatch.errors import AutobatchError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

__all__ = ["main"]

_DESCRIPTION = "Find the largest micro-batch that really trains on a GPU, and hit an effective batch size exactly."
_EPILOG = """\
exit codes: 0 fits; 1 the result cannot be written; 2 usage; 3 does not fit even at the smallest size; 4 the training job
failed or took too long; 5 the target cannot be hit under the split; 6 check found a difference; 69 no GPU, driver or
service; 75 GPU busy or deadline passed; 129 hung up; 130 interrupted; 143 terminated"""


# Of 1 for equal words: `headrom`, `micro-batch` and `dev` are near a flag, `foo` is near none.
# What training commands begin with.
_LAUNCHERS = ("python", "torchrun", "accelerate", "deepspeed")
_NEAR = 0.65
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class _EndedBySignal(BaseException):
    """A signal that ends the program, raised where it stands so that everything on the way out is closed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with the way out, and exit 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def flags(self) -> tuple[str, ...]:
        """Every flag that this parser takes."""
        return tuple(flag for action in self._actions for flag in action.option_strings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; those of the process where None.

    Returns:
        The exit status.
    """
    _hold_standard_streams()
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    try:
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:  # nohup: started to outlive its terminal
                signal.signal(number, _raise_ended)
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except _EndedBySignal as ended:
        say("terminated")
        return 128 + ended.number
    except BrokenPipeError:
        silence_output()
        return 141
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in service.COMMANDS:
        return _run_service(arguments)
    words, command = _split_command(arguments)
    parser = _build_parser()
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        hint = _nearest_flag(parsed.parser, unknown[0]) or _command_hint(parsed.parser, words, unknown)
        parsed.parser.error(f"{' '.join(unknown)} is not understood{hint}")
    parsed.command = command
    try:
        return int(parsed.run(parsed))
    except AutobatchError as error:
        return _show(error, verbose=getattr(parsed, "verbose", False))
    except ModuleNotFoundError as error:
        from autobatch.doctor import missing_packages

        if not (missing := missing_packages()):
            raise
        packages = " ".join(missing)
        return _show(UnavailableError(f"{error}: pip install {packages}, or install autobatch itself"), verbose=False)


def _run_service(words: list[str]) -> int:
    try:
        return service.run(words)
    except AutobatchError as error:
        return _show(error, verbose=False)


def _nearest_flag(parser: Parser, word: str) -> str:
    import difflib

    if not word.startswith("-"):
        return ""
    # Without their dashes, which every flag has: --foo is not like --format.
    flags = {flag.lstrip("-"): flag for flag in parser.flags()}
    near = difflib.get_close_matches(word.partition("=")[0].lstrip("-"), flags, n=1, cutoff=_NEAR)
    return f": did you mean {flags[near[0]]}?" if near else ""


def _command_hint(parser: Parser, words: list[str], unknown: list[str]) -> str:
    """Say where a command belongs, to who has written one without `--`."""
    program = next((word for word in words[1:] if Path(word).name.startswith(_LAUNCHERS)), None)
    script = next((word for word in unknown if word.endswith(".py")), None)
    if program is None and script is None:
        return ""
    return f": a command is written behind --, as in {parser.prog} … -- {program or 'python'} {script or '…'}"


def _hold_standard_streams() -> None:
    """Open what is closed of descriptors 0 to 2, so that no pipe or log of ours takes such a number."""
    if None in {sys.stdin, sys.stdout, sys.stderr}:
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)


def _split_command(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """Part our own arguments from a command after `--`."""
    if "--" not in arguments:
        return arguments, None
    position = arguments.index("--")
    return arguments[:position], arguments[position + 1 :]


def _build_parser() -> Parser:
    from autobatch.cli import cache, cards, check, emulate, plan, probe, rank, run

    parser = Parser(
        prog="autobatch",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"autobatch {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (probe, run, rank, plan, check, cache, emulate, cards, service):
        module.add_commands(commands)
    for command in commands.choices.values():
        if command.get_default("run") is not None:  # one with actions of its own leaves it to them
            command.set_defaults(parser=command)
    return parser


def _raise_ended(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise _EndedBySignal(number)


def _show(error: AutobatchError, *, verbose: bool) -> int:
    text = getattr(error, "traceback_text", "")
    if verbose and text and sys.stderr is not None:
        sys.stderr.write(text.rstrip() + "\n")
    hint = " (--verbose shows its traceback)" if text and not verbose else ""
    say(f"{error}{hint}")
    return error.exit_code
