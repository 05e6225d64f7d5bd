"""Files that people name on the command line: looked at before a probe of minutes, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from autobatch.errors import UsageError

__all__ = ["check_writable", "write_whole"]


def check_writable(path: str | Path, *, what: str) -> None:
    """Refuse a file that could not be written later.

    Args:
        path: the file.
        what: what it is to the user: `plot`.

    Raises:
        UsageError: its folder is missing or not writable, or it is a folder itself.
    """
    target = Path(path)
    try:
        folder, is_folder = target.resolve().parent, target.is_dir()
    except OSError as error:
        raise UsageError(f"{what} {str(path)!r}: {error.strerror}; name another file") from None
    if not folder.is_dir():
        raise UsageError(f"{what} {str(path)!r}: there is no folder {str(folder)!r}; make it, or name another file")
    if is_folder:
        raise UsageError(f"{what} {str(path)!r} is a folder: name a file in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{what} {str(path)!r}: the folder {str(folder)!r} is not writable; name another file")


def write_whole(path: str | Path, content: bytes, *, what: str) -> None:
    """Write a file beside its name and rename it: one that is there stays as it is until the new one is written.

    Raises:
        UsageError: the disk refuses it.
    """
    try:
        # What a link names is replaced rather than the link.
        _replace(Path(path).resolve(), content)
    except OSError as error:
        raise UsageError(f"{what} {str(path)!r} cannot be written: {error.strerror}; name another file") from None


def _replace(target: Path, content: bytes) -> None:
    beside = target.with_name(f".autobatch-{secrets.token_hex(8)}")
    try:
        # Not `tempfile`: its files are for their owner alone, and renaming would keep that.
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
