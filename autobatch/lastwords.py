"""What another process left: the error that it told of and, where it died, its log: where it stood, what it said last."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch import errors
from autobatch.errors import AutobatchError, WorkloadError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["last_line", "last_place", "read_tail", "rebuilt_error", "was_importing"]

_MOST_BYTES = 1 << 18
_OWN_FOLDER = str(Path(__file__).parent)
_FRAME = re.compile(r'\s*File "(?P<file>.+)", line (?P<line>\d+|\?\?\?) in (?P<function>.+)')
_INSTALLED = re.compile(r".*/(?:site|dist)-packages/(?P<package>[^/.]+)")
# faulthandler's dump: the error, the stacks of the threads, the modules in C.
_DUMP_STARTS = ("Fatal Python error: ",)
_LONGEST_LINE = 200


def rebuilt_error(described: Mapping[str, str], *, note: str = "") -> AutobatchError:
    """The error that another process told of.

    Args:
        described: its class by name as `kind`, its `message` and its `traceback`; an unknown class is a `WorkloadError`.
        note: what to add to the message of a `WorkloadError`.
    """
    kind = getattr(errors, described["kind"], WorkloadError)
    if issubclass(kind, AutobatchError) and not issubclass(kind, WorkloadError):
        return kind(described["message"])
    return WorkloadError(described["message"] + note, traceback_text=described["traceback"])


def read_tail(descriptor: int, lines: int) -> str:
    """Read the last lines of a log, at most 256 KiB of it: a job may print without end.

    Args:
        descriptor: the open log; its position is left as it is, since a writer may share it.
        lines: how many lines.
    """
    size = os.fstat(descriptor).st_size
    start = max(0, size - _MOST_BYTES)
    text = os.pread(descriptor, size - start, start).decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def last_place(log: str) -> str:
    """Name where a crash stood, `train.py, line 7 in step`: the innermost frame of the job's own; empty if there is none.

    A frame of the standard library or of an installed package alone would say nothing of what to mend.
    """
    for frame in _frames(log):
        if not _is_machinery(frame["file"]):
            return f"{frame['file']}, line {frame['line']} in {frame['function']}"
    return ""


def was_importing(log: str) -> str:
    """Name the installed package that was being imported when a crash came, such as `torch`; empty if none was."""
    importing = [frame["file"] for frame in _frames(log) if frame["function"] == "<module>"]
    packages = [match["package"] for file in importing if (match := _INSTALLED.match(file))]
    return packages[-1] if packages else ""  # the outermost: what was asked for, rather than what that needs


def last_line(log: str) -> str:
    """The last line that the process itself wrote, shortened where it is long; empty if there is none."""
    said, _ = _part(log)
    written = [line.strip() for line in said if line.strip()]
    if not written:
        return ""
    line = written[-1]
    return line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + " …"


def _part(log: str) -> tuple[list[str], list[str]]:
    """Part what the process wrote from faulthandler's dump after it."""
    lines = log.splitlines()
    for index, line in enumerate(lines):
        if line.startswith(_DUMP_STARTS):
            return lines[:index], lines[index:]
    return lines, []


def _crashed_thread(dump: list[str]) -> list[str]:
    """The stack of the thread that the dump calls the current one; every stack where it names none."""
    for index, line in enumerate(dump):
        if line.startswith("Current thread "):
            rest = dump[index + 1 :]
            return rest[: rest.index("")] if "" in rest else rest
    return dump


def _frames(log: str) -> list[re.Match[str]]:
    """The frames of the crashed thread, innermost first."""
    _, dump = _part(log)
    return [match for line in _crashed_thread(dump) if (match := _FRAME.fullmatch(line))]


def _is_machinery(file: str) -> bool:
    return file.startswith((_OWN_FOLDER, "<")) or bool(_INSTALLED.match(file)) or _STANDARD_LIBRARY in file


_STANDARD_LIBRARY = os.path.dirname(os.__file__)  # noqa: PTH120 - compared with text as faulthandler writes it
