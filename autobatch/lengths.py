"""A micro-batch for each sequence length: which lengths, in which order, and where the search for each begins."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.errors import UsageError

# Imported at run time: the JSON form resolves the annotations below.
from autobatch.report import Report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["LENGTH_PLACE", "LengthEntry", "LengthTable", "first_size", "order_of_lengths", "parse_lengths"]

LENGTH_PLACE = "{seq_len}"
_MOST_LENGTHS = 256


@dataclass(frozen=True, kw_only=True)
class LengthEntry:
    """What was found for one length."""

    seq_len: int
    """Length of every sequence, in tokens or whatever the job counts."""
    report: Report
    """The probe at this length, its trials and its plan; the plan is None where nothing fits."""


@dataclass(frozen=True, kw_only=True)
class LengthTable:
    """A micro-batch for each length, as loaders need that put sequences of like length together."""

    entries: tuple[LengthEntry, ...]
    """By length, shortest first."""

    @property
    def micro_batch_sizes(self) -> Mapping[int, int | None]:
        """The plan's micro-batch for each length; None where nothing fits."""
        return {one.seq_len: one.report.plan.micro_batch_size if one.report.plan else None for one in self.entries}


def parse_lengths(text: str) -> tuple[int, ...]:
    """Read lengths: numbers and ranges with commas between them.

    Args:
        text: such as `128,256,512` or `128-1024:128`, which counts from 128 to 1024 in steps of 128.

    Returns:
        Different lengths, shortest first.

    Raises:
        UsageError: it is not that, or names more than 256.

    Example:
        >>> parse_lengths("512,128-256:64")
        (128, 192, 256, 512)
    """
    found: set[int] = set()
    for part in text.split(","):
        span, _, step = part.strip().partition(":")
        low, dash, high = span.partition("-")
        numbers = [low, *([high] if dash else []), *([step] if step else [])]
        if not all(number.isdecimal() and int(number) > 0 for number in numbers) or (step and not dash):
            raise UsageError(
                f"sizes {text!r}: {part.strip()!r} is neither a length such as 512 nor a range such as 128-1024:128"
            )
        lengths = range(int(low), int(high if dash else low) + 1, int(step or 1))
        if not lengths or len(lengths) > _MOST_LENGTHS:
            raise UsageError(f"sizes {text!r}: {part.strip()} names {len(lengths)} lengths; name 1 to {_MOST_LENGTHS}")
        found.update(lengths)
    if len(found) > _MOST_LENGTHS:
        raise UsageError(f"sizes {text!r} names {len(found)} lengths; name {_MOST_LENGTHS} at most")
    return tuple(sorted(found))


def order_of_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The order in which lengths are probed: the longest, the shortest, then the middle of the widest gap.

    The longest shows first whether anything fits at all, and every later one has neighbours on both sides to begin from.

    Args:
        lengths: shortest first.
    """
    if len(lengths) <= 1:
        return tuple(lengths)
    order = [len(lengths) - 1, 0]
    done = sorted(order)
    while len(done) < len(lengths):
        left, right = max(itertools.pairwise(done), key=lambda gap: gap[1] - gap[0])
        middle = (left + right) // 2
        order.append(middle)
        bisect.insort(done, middle)
    return tuple(lengths[position] for position in order)


def first_size(length: int, found: Mapping[int, int]) -> int | None:
    """Where to begin the search at a length, from what fitted at others; None where nothing is known.

    Between two lengths the size follows a power of the length, whose exponent the two tell; from one alone it is taken that
    memory grows with the tokens. It only proposes: trials decide.

    Args:
        length: the length to be probed.
        found: the largest size that fitted, by length.
    """
    known = sorted((one, size) for one, size in found.items() if size > 0)
    if not known:
        return None
    if len(known) == 1:
        (one, size), exponent = known[0], -1.0
    else:
        position = min(max(1, bisect.bisect_left(known, (length, 0))), len(known) - 1)
        (one, size), (other, other_size) = known[position - 1 : position + 1]
        exponent = math.log(other_size / size) / math.log(other / one)
    proposed: float = size * math.pow(length / one, exponent)
    return max(1, round(proposed))
