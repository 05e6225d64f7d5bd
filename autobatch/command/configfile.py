"""A key of a JSON, YAML or TOML file, set in a copy of it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["FileEdit", "write_edited"]

_FORM = "--set takes FILE:KEY=VALUE, such as config.yaml:train.batch_size={micro_batch_size}"


@dataclass(frozen=True, kw_only=True)
class FileEdit:
    """One key of one file, and what it is set to."""

    path: Path
    key: str
    """Names on the way to the value, with dots between them; a number counts items of a list from 0."""
    value: str

    @classmethod
    def parse(cls, text: str) -> FileEdit:
        """Read `FILE:KEY=VALUE`.

        Raises:
            UsageError: it has another form, or the file is of another kind.
        """
        place, equals, value = text.partition("=")
        file, colon, key = place.rpartition(":")
        if not (equals and colon and file and key and all(key.split("."))):
            raise UsageError(f"{_FORM}; {text!r} is not that")
        path = Path(file)
        if path.suffix.lower() not in _KINDS:
            raise UsageError(f"--set {text}: {path.name} is none of {', '.join(_KINDS)}")
        return cls(path=path, key=key, value=value)

    @property
    def text(self) -> str:
        """The edit as it was written."""
        return f"{self.path}:{self.key}={self.value}"

    def check(self) -> None:
        """See that the file has the key.

        Raises:
            UsageError: the file cannot be read, or has no such key.
        """
        _find(_load(self.path)[0], self)


def write_edited(path: Path, copy: Path, values: Mapping[str, str]) -> None:
    """Write a copy of a file in which keys have other values.

    Args:
        path: the file, which is left as it is.
        copy: where the copy goes; its folder is made.
        values: text for each key, taken as a JSON value where it is one (`8` is a number), as text otherwise.

    Raises:
        UsageError: the file cannot be read, or has no such key.
    """
    document, dump = _load(path)
    for key, text in values.items():
        holder, last = _find(document, FileEdit(path=path, key=key, value=text))
        try:
            holder[last] = _value(text)
            dump(document)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path.name} cannot hold {text} at {key}: {error}") from None
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(dump(document), encoding="utf-8")


def _find(document: Any, edit: FileEdit) -> tuple[Any, Any]:
    """The container of a key's value, and the last name or number in it."""
    names = edit.key.split(".")
    holder = document
    for position, name in enumerate(names):
        at: Any = int(name) if isinstance(holder, list) and name.isdecimal() else name
        is_there = at < len(holder) if isinstance(at, int) else hasattr(holder, "keys") and at in holder
        if not is_there:
            known = ", ".join(map(str, holder)) if hasattr(holder, "keys") else f"a {type(holder).__name__}"
            where = ".".join(names[:position]) or "the file"
            raise UsageError(f"{edit.path} has no key {edit.key} (dots part names): {where} has {known}")
        if position == len(names) - 1:
            return holder, at
        holder = holder[at]
    raise AssertionError(edit.key)  # split() gives at least one name


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _load(path: Path) -> tuple[Any, Callable[[Any], str]]:
    """A file's content, and what writes such content in its format."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return _KINDS[path.suffix.lower()](text)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def _json(text: str) -> tuple[Any, Callable[[Any], str]]:
    return json.loads(text), lambda document: json.dumps(document, indent=2)


def _yaml(text: str) -> tuple[Any, Callable[[Any], str]]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.events import AliasEvent

    yaml = YAML()  # keeps comments, quotes and order: what is not set reads as before
    yaml.preserve_quotes = True
    read: Callable[[str], Any] = yaml.load
    if any(isinstance(event, AliasEvent) for event in _events(text)):
        # Where a part stands twice, setting a key of the one would set the other's: each gets a copy of its own.
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        read = lambda content: _unshared(yaml.load(content))  # noqa: E731

    def dump(document: Any) -> str:
        stream = io.StringIO()
        yaml.dump(document, stream)
        return stream.getvalue()

    try:
        return read(text), dump
    except YAMLError as error:
        raise ValueError(str(error)) from None


def _events(text: str) -> list[Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return list(YAML().parse(text))
    except YAMLError:
        return []  # told when it is loaded


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _toml(text: str) -> tuple[Any, Callable[[Any], str]]:
    import tomlkit
    from tomlkit.exceptions import ParseError

    try:
        return tomlkit.parse(text), tomlkit.dumps
    except ParseError as error:
        raise ValueError(str(error)) from None


_KINDS = {".json": _json, ".yaml": _yaml, ".yml": _yaml, ".toml": _toml}
