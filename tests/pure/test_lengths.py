"""Lengths are read, ordered, and each search begins where others ended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch import UsageError
from autobatch.lengths import first_size, order_of_lengths, parse_lengths


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("512", (512,)), ("256, 128", (128, 256)), ("1-4", (1, 2, 3, 4)), ("128-512:128,200", (128, 200, 256, 384, 512))],
)
def test_lengths_are_read(text: str, lengths: tuple[int, ...]) -> None:
    """Numbers and ranges, in order and once each."""
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text", ["", "a", "0", "-5", "4-2", "1-", "1:2", "1-9:0", "1-1000", "1-200,300-400", "1.5", "²"]
)
def test_what_is_no_length(text: str) -> None:
    """One line that names the part."""
    with pytest.raises(UsageError, match="sizes "):
        parse_lengths(text)


@given(st.sets(st.integers(1, 10_000), min_size=1, max_size=40).map(sorted))
def test_the_order_is_a_permutation_from_the_ends(lengths: list[int]) -> None:
    """The longest and the shortest come first; all come once."""
    order = order_of_lengths(lengths)
    assert sorted(order) == lengths
    assert order[0] == lengths[-1]
    assert len(order) == 1 or order[1] == lengths[0]


@given(st.floats(-2.5, -0.2), st.integers(1, 6).map(lambda power: 2**power * 100))
def test_a_power_law_is_met(exponent: float, length: int) -> None:
    """Between and beyond two lengths, whose sizes follow a power of the length, within the rounding of those."""

    def law(one: int) -> float:
        return 1e13 * one**exponent

    found = {100: round(law(100)), 6400: round(law(6400))}
    proposed = first_size(length, found)
    assert proposed is not None
    assert proposed == pytest.approx(law(length), rel=0.02)


def test_from_one_length_or_none() -> None:
    """Tokens are taken to be what costs; a length at which nothing fitted says nothing."""
    assert first_size(128, {}) is None
    assert first_size(128, {256: 0}) is None
    assert first_size(128, {256: 50}) == 100
    assert first_size(10**9, {256: 50}) == 1
