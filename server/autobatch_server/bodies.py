"""Request bodies: how deep they are, and whether every reader would read the same from them (I-JSON, RFC 7493)."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BodyError", "depth_exceeds", "is_json", "read_strictly"]

_LARGEST_INTEGER = 2**53 - 1  # RFC 7493, 2.2: beyond it readers that keep numbers as doubles see another one
# Possessive, and without need of the closing quote: one pass over the body, whatever stands in it.
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_ROUND = bytes.maketrans(b"{}", b"[]")
_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_SURROGATE = re.compile("[\ud800-\udfff]")


class BodyError(ValueError):
    """A body is no JSON, or readers could differ over it; the message is meant for who sent it."""


def is_json(content_type: str) -> bool:
    """Whether a Content-Type says JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def depth_exceeds(body: bytes, deepest: int) -> bool:
    """Whether JSON is nested more deeply than that, told without building it.

    Every pass takes away what is innermost, so the time is at most `deepest` + 1 passes over the brackets of the body. Brackets
    that nothing closes count as well.
    """
    if body.count(b"[") + body.count(b"{") <= deepest:
        return False
    left = _TEXT.sub(b"", body).translate(_ROUND, _BRACKETS)
    for _ in range(deepest):
        smaller = left.replace(b"[]", b"")
        if len(smaller) == len(left):
            break
        left = smaller
    return b"[]" in left or left.count(b"[") > deepest


def read_strictly(body: bytes) -> object:
    """Read JSON that means the same to every reader.

    Raises:
        BodyError: it is not in UTF-8 or is no JSON; a name stands twice in an object; a number is not finite, or an integer
            beyond 2^53 - 1; a string holds half a surrogate pair, or NUL, which PostgreSQL cannot keep.
    """
    try:
        text = body.decode()
        value = json.loads(
            text,
            object_pairs_hook=_without_doubles,
            parse_int=_read_integer,
            parse_float=_read_number,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError:
        raise BodyError("it is not in UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise BodyError("it is not JSON") from None
    if _SUSPECT.search(text) and any("\0" in one or _SURROGATE.search(one) for one in _strings_of(value)):
        raise BodyError("a string holds NUL or half a surrogate pair")
    return value


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise BodyError("a name stands twice in one object")
    return content


def _read_integer(digits: str) -> int:
    if len(digits) > 17 or abs(int(digits)) > _LARGEST_INTEGER:
        raise BodyError("an integer is beyond 2^53 - 1")
    return int(digits)


def _read_number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise BodyError("a number is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise BodyError(f"{name} is no JSON")


def _strings_of(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from _strings_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings_of(part)
