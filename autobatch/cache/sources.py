"""The files that a training job is made of: measurements hold for as long as none of them changes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["CurrentFiles", "hash_files", "loaded_files"]

_LARGEST_BYTES = 16 << 20
_MOST_FILES = 400
_OWN_FOLDER = str(Path(__file__).parents[1])
_INSTALLED = ("site-packages", "dist-packages")


def loaded_files() -> list[str]:
    """The modules of the user's own that this process has imported, its script among them.

    What was installed is left out (a new version of torch is known by other means), and so is the standard library.
    """
    left_out = tuple(f"{folder}{os.sep}" for folder in _installed_folders())
    found = set()
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.endswith((".py", ".so")):
            continue
        # Not resolved: a link that points elsewhere the next time is a change.
        absolute = os.path.abspath(path)  # noqa: PTH100 - Path.absolute leaves `..` in
        resolved = os.path.realpath(path)
        if resolved.startswith(left_out) or any(part in _INSTALLED for part in Path(resolved).parts):
            continue
        found.add(absolute)
    return sorted(found)[:_MOST_FILES]


def _installed_folders() -> set[str]:
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib") if name in paths}
    with contextlib.suppress(AttributeError):  # some embedded interpreters lack it
        folders.update(site.getsitepackages())
    return {os.path.realpath(folder) for folder in (*folders, _OWN_FOLDER)}


def hash_files(paths: Iterable[str | Path]) -> dict[str, str]:
    """Hash the content of files; those that are gone, or larger than 16 MiB, are left out."""
    hashes = {}
    for path in sorted({os.path.abspath(path) for path in paths})[:_MOST_FILES]:  # noqa: PTH100
        digest = _hash(path)
        if digest:
            hashes[path] = digest
    return hashes


class CurrentFiles:
    """The files as they are now; each is read once, however many measurements it stands behind."""

    def __init__(self) -> None:
        """Nothing has been read yet."""
        self._hashes: dict[str, str] = {}

    def changed_since(self, hashes: Mapping[str, str]) -> list[str]:
        """Those of which the content is another than a hash of it says, or that are gone."""
        return [path for path, digest in hashes.items() if self._now(path) != digest]

    def _now(self, path: str) -> str:
        if path not in self._hashes:
            self._hashes[path] = _hash(path)
        return self._hashes[path]


def _hash(path: str) -> str:
    """SHA-256 of a file's content; empty where it cannot be read, is no file or is too large."""
    try:
        file = Path(path)
        if not file.is_file() or file.stat().st_size > _LARGEST_BYTES:
            return ""
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
