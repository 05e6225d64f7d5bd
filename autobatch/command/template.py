"""A training command with places for the micro-batch size and what follows from it."""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.command.configfile import FileEdit, write_edited
from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from autobatch.options import ProbeOptions

__all__ = ["MICRO_BATCH_VARIABLE", "CommandTemplate", "CommandValues", "RenderedCommand"]

MICRO_BATCH_VARIABLE = "AUTOBATCH_MICRO_BATCH_SIZE"
_NAMES = ("micro_batch_size", "accumulation_steps", "target", "world_size", "seq_len")
_PLACE = re.compile(r"\{(" + "|".join(_NAMES) + r")\}")
_BRACED = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class CommandValues:
    """What stands in a command's places."""

    micro_batch_size: int
    """Samples of one forward and backward on one rank."""
    accumulation_steps: int
    """Micro-batches before each optimizer step."""
    target: int
    """Samples per optimizer step, over all ranks."""
    world_size: int
    """Data-parallel ranks."""
    seq_len: int | None = None
    """Length of every sequence; None where lengths are not told apart."""


@dataclass(frozen=True, kw_only=True)
class RenderedCommand:
    """A command that can be started."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    """Variables to add to the environment."""


@dataclass(frozen=True, kw_only=True)
class CommandTemplate:
    """The user's command line, with places such as `{micro_batch_size}`, and keys of files to set."""

    arguments: tuple[str, ...]
    edits: tuple[FileEdit, ...] = ()

    @classmethod
    def parse(cls, arguments: Sequence[str], edits: Sequence[str] = ()) -> CommandTemplate:
        """Read a command and its `--set FILE:KEY=VALUE`.

        Raises:
            UsageError: there is no command, an edit is malformed, or its file is no argument of the command.
        """
        if not arguments:
            raise UsageError("no command: write -- and the training command behind it")
        template = cls(arguments=tuple(arguments), edits=tuple(map(FileEdit.parse, edits)))
        for edit in template.edits:
            edit.check()
            if not any(_names(argument, edit.path) for argument in template.arguments):
                raise UsageError(
                    f"--set edits a copy of {edit.path}, but no argument of the command names that file, so that the copy could "
                    f"not be given to it: write it as in `python train.py --config {edit.path}`"
                )
        return template

    @property
    def text(self) -> str:
        """The command as a shell takes it: its name in a report."""
        words = shlex.join(self.arguments)
        return words if not self.edits else f"{words} [{', '.join(edit.text for edit in self.edits)}]"

    def uses(self, name: str) -> bool:
        """Tell whether the command has a place of this name, or is seen to name its variable."""
        texts = (*self.arguments, *(edit.value for edit in self.edits))
        return any(f"{{{name}}}" in text or _variable(name) in text for text in texts)

    def can_accumulate(self, variables_read: Collection[str]) -> bool:
        """Tell whether the number of accumulation steps reaches the command, by itself or through the target.

        Args:
            variables_read: names of the variables that a process of the command read.
        """
        names = ("accumulation_steps", "target")
        return any(self.uses(name) or _variable(name) in variables_read for name in names) or any(
            self._is_named_in_a_script(_variable(name)) for name in names
        )

    def check_size_is_used(self, *, variable_read: bool) -> None:
        """Refuse a command of which nothing depends on the micro-batch size.

        Args:
            variable_read: whether a process of the command read `AUTOBATCH_MICRO_BATCH_SIZE`.

        Raises:
            UsageError: nothing does.
        """
        if variable_read or self.uses("micro_batch_size") or self._is_named_in_a_script(MICRO_BATCH_VARIABLE):
            return
        unknown = self.misspelt()
        hint = f" ({{{unknown}}} is no place)" if unknown else ""
        raise UsageError(
            f"nothing of the command depends on the micro-batch size{hint}: write {{micro_batch_size}} where it stands among the "
            f"arguments, give --set FILE:KEY={{micro_batch_size}}, or read the variable {MICRO_BATCH_VARIABLE} in the script"
        )

    def check_options(self, options: ProbeOptions, *, lengths: Sequence[int] = ()) -> None:
        """Refuse what this command cannot be given.

        Args:
            options: what the probe is asked.
            lengths: the sequence lengths to probe at, where they are told apart.

        Raises:
            UsageError: the plan would mix sizes, or lengths are given without a place for them, or the other way round.
        """
        if bool(lengths) != self.uses("seq_len"):
            raise UsageError(
                "--sizes names sequence lengths, and the command has no {seq_len} for them"
                if lengths
                else "the command has a place for {seq_len}: say which lengths by --sizes, such as --sizes 128,256,512"
            )
        if options.split != "even":
            raise UsageError(
                f"split {options.split} mixes two micro-batch sizes, and a command takes one: leave --split even"
            )

    def misspelt(self) -> str:
        """A word in braces that is near the name of a place; empty where there is none."""
        words = [word for text in self.arguments for word in _BRACED.findall(text) if word not in _NAMES]
        return next((word for word in words if difflib.get_close_matches(word, _NAMES, n=1, cutoff=0.5)), "")

    def _is_named_in_a_script(self, variable: str) -> bool:
        """Whether an argument is a file, such as a shell script, that names the variable."""
        for argument in self.arguments:
            path = Path(argument)
            try:
                if path.is_file() and path.stat().st_size < 1 << 20 and variable in path.read_text("utf-8"):
                    return True
            except (OSError, UnicodeDecodeError):
                continue
        return False

    def render(self, values: CommandValues, folder: Path) -> RenderedCommand:
        """Put values into the places.

        Args:
            values: what to put.
            folder: where edited copies of files are written; the originals stay as they are.

        Raises:
            UsageError: a file cannot be read or edited.
        """
        table = {name: str(value) for name in _NAMES if (value := getattr(values, name)) is not None}
        arguments = [_fill(argument, table) for argument in self.arguments]
        by_file: dict[Path, list[tuple[FileEdit, str]]] = {}
        for edit in self.edits:
            by_file.setdefault(edit.path, []).append((edit, _fill(edit.value, table)))
        for number, (path, edits) in enumerate(by_file.items()):
            copy = folder / str(number) / path.name
            write_edited(path, copy, {edit.key: value for edit, value in edits})
            arguments = [_renamed(argument, path, copy) for argument in arguments]
        return RenderedCommand(
            arguments=tuple(arguments),
            environment={_variable(name): value for name, value in table.items()},
        )


def _variable(name: str) -> str:
    return f"AUTOBATCH_{name.upper()}"


def _fill(text: str, table: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda match: table.get(match[1], match[0]), text)


def _names(argument: str, path: Path) -> bool:
    return any(_is_same(part, path) for part in (argument, argument.partition("=")[2]))


def _is_same(text: str, path: Path) -> bool:
    return bool(text) and Path(text).absolute() == path.absolute()


def _renamed(argument: str, path: Path, copy: Path) -> str:
    if _is_same(argument, path):
        return str(copy)
    flag, equals, value = argument.partition("=")
    return f"{flag}={copy}" if equals and _is_same(value, path) else argument
