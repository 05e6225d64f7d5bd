"""The JSON form: what goes out comes back as it was, and malformed input is one line that names the place."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from autobatch.errors import UsageError
from autobatch.jsonform import from_json_form, to_json_form


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int
    colour: Colour = Colour.RED

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size {self.size} is below 1")


@dataclass(frozen=True, kw_only=True)
class Whole:
    parts: tuple[Part, ...]
    ratio: float | None
    hint: str | None = field(default=None, metadata={"omit_none": True})


@dataclass(frozen=True, kw_only=True)
class Pair:
    left: int
    right: Part | None = None


GOOD: dict[str, Any] = {"left": 1, "right": {"size": 2, "colour": "blue"}}


def test_form_of_a_value() -> None:
    """Objects in the order of fields, arrays, enum values, null; an omitted field where it says so."""
    pair = Pair(left=1, right=Part(size=2, colour=Colour.BLUE))
    assert json.dumps(to_json_form(pair)) == '{"left": 1, "right": {"size": 2, "colour": "blue"}}'
    assert to_json_form(Pair(left=1)) == {"left": 1, "right": None}
    whole = Whole(parts=(), ratio=None)
    assert to_json_form(whole) == {"parts": [], "ratio": None}
    assert to_json_form({"a": (1, 2.5, True)}) == {"a": [1, 2.5, True]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": (float("-inf"),)}])
def test_a_figure_that_json_lacks_is_refused(value: object) -> None:
    """A missing figure is null, never nan."""
    with pytest.raises(ValueError, match="has no JSON form; a missing figure is None"):
        to_json_form(value)


@pytest.mark.parametrize("value", [object(), {1: 2}, {1, 2}, Pair, b"x"])
def test_other_types_are_refused(value: object) -> None:
    """Nothing is turned to text silently."""
    with pytest.raises(TypeError, match="JSON"):
        to_json_form(value)


def test_reading_checks_no_more_than_the_types() -> None:
    """Defaults fill what is absent, unknown keys are passed over, whole numbers do for floats."""
    assert from_json_form(Pair, {"left": 3, "unheard_of": [1]}) == Pair(left=3)
    assert from_json_form(Pair, GOOD) == Pair(left=1, right=Part(size=2, colour=Colour.BLUE))


@dataclass(frozen=True, kw_only=True)
class Scalars:
    number: float = 0.0
    maybe: float | None = None
    either: str | int = 0
    mode: Literal["a", "b"] = "a"
    on: bool = False
    table: tuple[tuple[int, ...], ...] = ()
    part: Part | None = None


def test_whole_numbers_become_floats() -> None:
    """JSON written elsewhere has 1 where Python writes 1.0."""
    value = from_json_form(Scalars, {"number": 1, "maybe": 2})
    assert isinstance(value.number, float)
    assert isinstance(value.maybe, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "thing is null; an object is wanted"),
        ([], "thing is []; an object is wanted"),
        ({"number": "1"}, "thing.number is '1'; a finite number is wanted"),
        ({"number": None}, "thing.number is null; a finite number is wanted"),
        ({"number": True}, "thing.number is True; a finite number is wanted"),
        ({"number": float("nan")}, "thing.number is nan; a finite number is wanted"),
        ({"maybe": "x"}, "thing.maybe is 'x'; a finite number is wanted"),
        ({"either": None}, "thing.either is null; a text or a whole number is wanted"),
        ({"either": 1.5}, "thing.either is 1.5; a text or a whole number is wanted"),
        ({"either": True}, "thing.either is True; a text or a whole number is wanted"),
        ({"mode": "c"}, "thing.mode is 'c'; choose a, b"),
        ({"mode": ["a"]}, "thing.mode is ['a']; choose a, b"),
        ({"on": 1}, "thing.on is 1; true or false is wanted"),
        ({"table": 1}, "thing.table is 1; an array is wanted"),
        ({"table": [[1], [1, "2"]]}, "thing.table[1][1] is '2'; a whole number is wanted"),
        ({"part": 7}, "thing.part is 7; an object is wanted"),
        ({"part": {}}, "thing.part.size is missing; an object with size, colour is wanted"),
        ({"part": {"size": 1, "colour": "green"}}, "thing.part.colour is 'green'; choose red, blue"),
        ({"part": {"size": 1, "colour": {}}}, "thing.part.colour is {}; choose red, blue"),
        ({"part": {"size": 0}}, "thing.part contradicts itself: size 0 is below 1"),
        ({"number": "x" * 500}, f"thing.number is '{'x' * 56}...; a finite number is wanted"),
        ({"number": 10**400}, f"thing.number is 1{'0' * 56}...; a finite number is wanted"),
    ],
)
def test_malformed_input_names_the_place(data: object, message: str) -> None:
    """Each is a usage error of one line: the place, what is there, what is wanted."""
    with pytest.raises(UsageError) as caught:
        from_json_form(Scalars, data, where="thing")
    assert str(caught.value) == message
    assert "\n" not in str(caught.value)


def test_a_field_without_json_form_is_a_fault_of_the_class() -> None:
    """Not the input's: it is no usage error."""

    @dataclass(frozen=True, kw_only=True)
    class Odd:
        thing: Any

    with pytest.raises(TypeError, match=r"odd.thing: fields of type typing.Any have no JSON form"):
        from_json_form(Odd, {"thing": 1})
