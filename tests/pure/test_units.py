"""Sizes and shares: what people write is read exactly, and anything ambiguous is refused in one clear line."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autobatch.errors import UsageError
from autobatch.units import format_bytes, format_percent, headroom_bytes, parse_bytes, parse_fraction


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096B", 4096),
        ("1048576", 1 << 20),
        (4096, 4096),
        (0, 0),
        ("0", 0),
        ("512MiB", 512 * 2**20),
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("  80gib ", 80 * 2**30),
        ("7 b", 7),
        ("2TB", 2 * 10**12),
        ("0.1KiB", 102),
        ("8191.9999PiB", 2**63 - 112_589_990_685),
    ],
)
def test_bytes_are_read_exactly(text: str | int, size: int) -> None:
    """Binary and decimal units differ, a fraction is scaled in whole numbers, a part of a byte is dropped."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a number of bytes"),
        ("-1", "'-1' is negative"),
        (-1, "-1 is negative"),
        ("nan", "is not a number of bytes"),
        ("inf", "is not a number of bytes"),
        ("1e9", "unknown unit|not a number"),
        ("12 parsecs", "unknown unit 'parsecs'"),
        ("3", "'3' is 3 bytes: write 3GiB, or 3B where bytes are meant"),
        ("1048575", "is 1048575 bytes: write 1048575MiB"),
        ("24000", "'24000' is 24000 bytes: write 24000MiB"),
        ("24G", "write 24GiB .* or 24GB"),
        ("0.5", "fraction of a byte"),
        ("1,000", "is not a number of bytes"),
        ("9" * 5000, "is not a number of bytes"),
        ("8192PiB", "above the largest size"),
        (2**63, "above the largest size"),
        (True, "True is not a number of bytes"),
        (1.5, "1.5 is not a number of bytes"),
        (None, "None is not a number of bytes"),
        ("٣GiB", "is not a number of bytes"),
    ],
)
def test_malformed_bytes_are_refused(text: object, words: str) -> None:
    """Every malformed size is a usage error of one line that says what is wrong with it."""
    with pytest.raises(UsageError, match=words) as caught:
        parse_bytes(text, name="memory_limit")  # type: ignore[arg-type]
    assert str(caught.value).startswith("memory_limit ")
    assert "write" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 * 2**20, "512 MiB"),
        (41231686042, "38.4 GiB"),
        (2**30 - 1, "1.0 GiB"),
        (2**30, "1 GiB"),
        (2**30 + 1, "1.0 GiB"),
        (2000 * 2**50, "2000 PiB"),
        (-(3 * 2**29), "-1.5 GiB"),
    ],
)
def test_bytes_are_written_for_readers(size: int, text: str) -> None:
    """Whole units stand alone, others have one decimal, and nothing reads as 1024.0 of a unit."""
    assert format_bytes(size) == text


@given(st.integers(min_value=0, max_value=2**62))
def test_written_bytes_read_back_within_rounding(size: int) -> None:
    """What `format_bytes` writes is at most half a decimal off, and exact below 1 KiB."""
    back = parse_bytes(format_bytes(size))
    assert abs(back - size) <= size * 0.051
    assert back == size or size >= 1024


@pytest.mark.parametrize(
    ("text", "share"),
    [("1%", 0.01), ("0.01", 0.01), ("0.8 %", 0.008), (0, 0.0), ("0", 0.0), (0.25, 0.25), ("1e-05", 1e-5), (".5", 0.5)],
)
def test_shares_are_read(text: str | float, share: float) -> None:
    """Percentages and plain numbers mean the same."""
    assert parse_fraction(text) == share


@pytest.mark.parametrize(
    "text",
    [
        *("", "%", "-1%", "-0.1", "nan", "inf", "nan%", "100%", "1", "5 percent", "1%%", "1_0%", "1e400%"),
        *(1, 1.0, -0.1, float("nan"), float("inf"), 10**400, True, None),
    ],
)
def test_shares_outside_zero_to_one_are_refused(text: object) -> None:
    """Anything that is not from 0 to below 1 is a usage error that shows how to write a share."""
    with pytest.raises(UsageError, match=r"^tolerance .*write a share like '1%'"):
        parse_fraction(text, name="tolerance")  # type: ignore[arg-type]


@example(part=187, whole=20_570_561)
@given(part=st.integers(min_value=0, max_value=10**9), whole=st.integers(min_value=1, max_value=10**9))
def test_a_written_percentage_is_never_below_the_share(part: int, whole: int) -> None:
    """Rounded up, and by less than a tenth: a tolerance taken from a message allows what the message said."""
    number = float(format_percent(part, whole).removesuffix("%"))
    true = part / whole * 100
    assert number >= true * (1 - 1e-12)
    assert number <= true * 1.1 + 1e-12


@pytest.mark.parametrize(
    ("headroom", "size"),
    [("3%", 30), (0, 0), ("0", 0), ("512B", 512), (512, 512), (0.5, 500), ("0.5 KiB", 512), (999, 999)],
)
def test_headroom_is_bytes_or_a_share_of_the_card(headroom: str | float, size: int) -> None:
    """A percent sign or a float is a share of the card, anything else bytes."""
    assert headroom_bytes(headroom, 1000) == size


def test_headroom_that_leaves_nothing_names_both_numbers() -> None:
    """Headroom at the card's total is refused, with both sizes in the message."""
    with pytest.raises(UsageError, match=r"headroom '24GiB' is 24 GiB and leaves nothing of the card's 24 GiB"):
        headroom_bytes("24GiB", 24 * 2**30)
    with pytest.raises(UsageError, match=r"80 GiB .* 24 GiB"):
        headroom_bytes("80GiB", 24 * 2**30)


@pytest.mark.parametrize(
    ("headroom", "words"), [("3", "3GiB, .*'3%'"), (" 12 ", "12GiB, .*'12%'"), ("512", "512MiB, .*'3%'")]
)
def test_a_headroom_without_a_unit_is_refused(headroom: str, words: str) -> None:
    """A bare 3 was meant as 3 % or 3 GiB, and never as 3 bytes; an int of the library is bytes."""
    with pytest.raises(UsageError, match=words):
        headroom_bytes(headroom, 2**30)
    assert headroom_bytes(int(headroom), 2**30) == int(headroom)


@pytest.mark.parametrize("headroom", ["", "lots", "100%", "-1%", -5, "0.02", True, None])
def test_malformed_headroom_is_refused_with_an_example(headroom: object) -> None:
    """The message of a malformed headroom shows how a share is written."""
    with pytest.raises(UsageError, match=r"headroom .*%'"):
        headroom_bytes(headroom, 2**30)  # type: ignore[arg-type]
