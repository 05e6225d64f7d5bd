"""The JSON form of the frozen values: one rule for plans, trials, options and reports.

A dataclass is an object with its fields in order, a tuple an array, an enum its value, and what is
missing is null. A field whose metadata says `omit_none` is left out where it is None. On the way in
a field that is absent takes its default, and one that is unknown is passed over, so that a reader
of today understands a writer of tomorrow; types are checked, and errors name the place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from autobatch.errors import AutobatchError, UsageError

__all__ = ["JsonValue", "from_json_form", "to_json_form"]

JsonValue = dict[str, "JsonValue"] | list["JsonValue"] | str | int | float | bool | None

T = TypeVar("T")


def to_json_form(value: object) -> JsonValue:
    """Turn a value into what `json.dumps` takes.

    Args:
        value: a dataclass of supported values, an enum with such a value, str, int, float, bool,
            None, or a list, tuple or str-keyed mapping of these.

    Raises:
        TypeError: a value of another type.
        ValueError: a float that JSON does not have (nan, infinity).
    """
    if isinstance(value, enum.Enum):
        return to_json_form(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no JSON form; a missing figure is None")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [to_json_form(item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a JSON object has only text as keys")
        return {key: to_json_form(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_json_form(item)
            for field in dataclasses.fields(value)
            if (item := getattr(value, field.name)) is not None or not field.metadata.get("omit_none")
        }
    raise TypeError(f"{type(value).__name__} has no JSON form")


def from_json_form(cls: type[T], data: object, *, where: str | None = None) -> T:
    """Make a dataclass from its JSON form.

    Args:
        cls: a dataclass whose fields are annotated with what `to_json_form` takes.
        data: what `json.loads` gave.
        where: what the data is, for the error message; the class's name where absent.

    Raises:
        UsageError: a field is missing, of the wrong type, or breaks the class's own rules.
    """
    place = where or cls.__name__.lower()
    if not isinstance(data, Mapping):
        raise UsageError(f"{place} is {_shown(data)}; an object is wanted")
    values: dict[str, Any] = {}
    dataclass: Any = cls
    fields: dict[str, tuple[object, bool]] = _fields_of(dataclass)
    for name, (hint, required) in fields.items():
        if name in data:
            values[name] = _read(hint, data[name], f"{place}.{name}")
        elif required:
            raise UsageError(f"{place}.{name} is missing; an object with {', '.join(fields)} is wanted")
    try:
        return cls(**values)
    except AutobatchError as error:
        raise UsageError(f"{place}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{place} contradicts itself: {error}") from error


@functools.cache
def _fields_of(cls: type) -> dict[str, tuple[object, bool]]:
    """Map each field's name to its type and whether it must be there."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: (
            hints[field.name],
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(cls)
    }


def _read(hint: object, data: object, place: str) -> object:
    """Read one value of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _read_union(arguments, data, place)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise UsageError(f"{place} is {_shown(data)}; an array is wanted")
        return tuple(_read(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(data))
    if origin is typing.Literal:
        if data not in arguments or isinstance(data, bool):
            raise UsageError(f"{place} is {_shown(data)}; choose {', '.join(map(str, arguments))}")
        return data
    if not isinstance(hint, type):
        raise TypeError(f"{place}: fields of type {hint} have no JSON form")
    if dataclasses.is_dataclass(hint):
        return from_json_form(hint, data, where=place)
    if issubclass(hint, enum.Enum):
        values = [member.value for member in hint]
        if data not in values:
            raise UsageError(f"{place} is {_shown(data)}; choose {', '.join(map(str, values))}")
        return hint(data)
    return _read_scalar(hint, data, place)


def _read_scalar(hint: type, data: object, place: str) -> object:
    """Read a number, a text or null; JSON's whole numbers do for floats, and true is not 1."""
    if hint is types.NoneType and data is None:
        return None
    if hint is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        with contextlib.suppress(OverflowError):  # an int above the largest float is no finite number either
            if math.isfinite(data):
                return float(data)
    elif hint in (str, int, bool) and type(data) is hint:
        return data
    if hint not in _SCALARS:
        raise TypeError(f"{place}: fields of type {hint} have no JSON form")
    raise UsageError(f"{place} is {_shown(data)}; {_SCALARS[hint]} is wanted")


def _read_union(arms: tuple[object, ...], data: object, place: str) -> object:
    """Read the first arm that fits; with one arm besides null, that arm says what is wrong."""
    others = [arm for arm in arms if arm is not types.NoneType]
    if data is None and len(others) < len(arms):
        return None
    if len(others) == 1:
        return _read(others[0], data, place)
    for arm in others:
        try:
            return _read(arm, data, place)
        except UsageError:
            continue
    names = " or ".join(_SCALARS.get(arm, str(arm)) for arm in others)
    raise UsageError(f"{place} is {_shown(data)}; {names} is wanted")


_SCALARS: dict[object, str] = {
    str: "a text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    types.NoneType: "null",
}


def _shown(data: object) -> str:
    """Show a value in a message, at a length that a line takes."""
    if data is None:
        return "null"
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
