"""Bytes and shares, as people write them and as people read them.

Inside the library bytes are ints and shares are floats; this module is the only way in and out.
"""

from __future__ import annotations

import re

from autobatch.errors import UsageError

__all__ = ["format_bytes", "format_percent", "headroom_bytes", "parse_bytes", "parse_fraction"]

_PREFIXES = "kmgtp"
_FACTORS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES, start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate(_PREFIXES, start=1)},
}
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_LARGEST_BYTES = 2**63 - 1
# Nobody writes so few bytes without a unit: it is a percentage, GiB or MiB whose unit was forgotten.
_FEWEST_BARE_BYTES = 1 << 20
_SIZE = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,19}))?\s*([A-Za-z]*)")
_PERCENTAGES = frozenset(map(str, range(1, 100)))
_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_SIZE_EXAMPLES = "write bytes like '512MiB', '24GiB', '24GB' or '4096B'"
_SHARE_EXAMPLES = "write a share like '1%' or '0.01', from 0 up to but not including 1"


def parse_bytes(text: str | int, *, name: str = "size") -> int:
    """Read a number of bytes.

    Args:
        text: a number with an optional unit, in any case: `B`, decimal `KB` to `PB`, binary `KiB`
            to `PiB`; or an int, taken as bytes. A fraction of a byte is dropped. Text without a unit is
            bytes too, but only 0 or from 1 MiB on: fewer were meant as something else.
        name: what the number is, for the error message.

    Returns:
        Bytes, from 0 to 2**63 - 1.

    Raises:
        UsageError: not a number, negative, too large, of an unknown unit, or of none where it needs one.

    Example:
        >>> parse_bytes("512MiB"), parse_bytes("24GB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
        (536870912, 24000000000, 1610612736, 4096)
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise UsageError(f"{name} {text!r} is not a number of bytes; {_SIZE_EXAMPLES}")
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            what = "is negative" if text.strip().startswith("-") else "is not a number of bytes"
            raise UsageError(f"{name} {text!r} {what}; {_SIZE_EXAMPLES}")
        size = _scaled(match, text, name)
        if not match[3] and 0 < size < _FEWEST_BARE_BYTES:
            unit = "GiB" if size < 256 else "MiB"
            raise UsageError(f"{name} {text!r} is {size} bytes: write {size}{unit}, or {size}B where bytes are meant")
    if size < 0:
        raise UsageError(f"{name} {text!r} is negative; {_SIZE_EXAMPLES}")
    if size > _LARGEST_BYTES:
        raise UsageError(f"{name} {text!r} is above the largest size, {_LARGEST_BYTES} bytes; {_SIZE_EXAMPLES}")
    return size


def _scaled(match: re.Match[str], text: str, name: str) -> int:
    """Multiply number and unit in whole numbers, so that no size is off by a float's rounding."""
    whole, decimals, unit = match[1], match[2] or "", match[3].lower()
    if unit not in _FACTORS:
        if len(unit) == 1 and unit in _PREFIXES:
            letter = unit.upper()
            raise UsageError(
                f"{name} {text!r} has an ambiguous unit {match[3]!r}; "
                f"write {match[1]}{letter}iB (1024-based) or {match[1]}{letter}B (1000-based)"
            )
        raise UsageError(f"{name} {text!r} has an unknown unit {match[3]!r}; {_SIZE_EXAMPLES}")
    if decimals and _FACTORS[unit] == 1:
        raise UsageError(f"{name} {text!r} is a fraction of a byte; {_SIZE_EXAMPLES}")
    scale: int = 10 ** len(decimals)
    return int(whole + decimals) * _FACTORS[unit] // scale


def format_bytes(num_bytes: int) -> str:
    """Write bytes for a reader, in binary units.

    Whole multiples of a unit are written without decimals; anything else has one, and is rounded.

    Args:
        num_bytes: bytes; a difference may be negative.

    Example:
        >>> format_bytes(536870912), format_bytes(41231686042), format_bytes(1000)
        ('512 MiB', '38.4 GiB', '1000 B')
    """
    sign, size = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    power = min(max(size.bit_length() - 1, 0) // 10, len(_BINARY_UNITS) - 1)
    # 1023.97 MiB would read as "1024.0 MiB": such a size is written in the next unit.
    if 0 < power < len(_BINARY_UNITS) - 1 and size % 1024**power and round(size / 1024**power, 1) >= 1024:
        power += 1
    unit = 1024**power
    number = str(size // unit) if size % unit == 0 else f"{size / unit:.1f}"
    return f"{sign}{number} {_BINARY_UNITS[power]}"


def parse_fraction(text: str | float, *, name: str = "share") -> float:
    """Read a share: a percentage or a plain number.

    Args:
        text: like `"1%"`, `"0.8 %"` or `"0.01"`; or a number, taken as it is.
        name: what the share is of, for the error message.

    Returns:
        The share, at least 0 and below 1.

    Raises:
        UsageError: not a number, negative, or 1 (100 %) and more.

    Example:
        >>> parse_fraction("1%"), parse_fraction("0.01"), parse_fraction(0)
        (0.01, 0.01, 0.0)
    """
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise UsageError(f"{name} {text!r} is not a share; {_SHARE_EXAMPLES}")
    percent = isinstance(text, str) and text.rstrip().endswith("%")
    number = text.strip().removesuffix("%").rstrip() if isinstance(text, str) else text
    if isinstance(number, str) and _NUMBER.fullmatch(number) is None:
        raise UsageError(f"{name} {text!r} is not a share; {_SHARE_EXAMPLES}")
    # Compared before the conversion: an int may be too large for a float. nan fails both ends.
    if not isinstance(number, str) and not 0 <= number < 1:
        raise UsageError(f"{name} {text!r} is outside 0 to 1; {_SHARE_EXAMPLES}")
    share = float(number) / 100 if percent else float(number)
    if share >= 1:
        raise UsageError(f"{name} {text!r} is outside 0 to 1; {_SHARE_EXAMPLES}")
    return share


def format_percent(part: int, whole: int) -> str:
    """Write `part / whole` as a percentage that is never below it, in as few digits as read well.

    Rounded up, so that the text given back as a tolerance allows at least `part`.

    Args:
        part: at least 0.
        whole: at least 1.

    Example:
        >>> format_percent(2, 250), format_percent(1, 257), format_percent(0, 5)
        ('0.8%', '0.39%', '0%')
    """
    decimals = 1
    while True:
        scaled = part * 100 * 10**decimals
        digits = -(-scaled // whole)
        if scaled >= 10 * whole or scaled % whole == 0:
            break
        decimals += 1
    text = f"{digits // 10**decimals}.{digits % 10**decimals:0{decimals}d}"
    return text.rstrip("0").rstrip(".") + "%"


def headroom_bytes(headroom: str | float, total_bytes: int, *, whose: str = "the card's") -> int:
    """Resolve a headroom against a card.

    Args:
        headroom: bytes (`"512MiB"`, an int) or a share of the card (`"3%"`, a float).
        total_bytes: the card's memory in bytes, as NVML reports it, or what is to be used of it.
        whose: what the memory is, for the error message.

    Returns:
        Bytes to leave free, at least 0 and below `total_bytes`.

    Raises:
        UsageError: malformed, or not below `total_bytes`.

    Example:
        >>> headroom_bytes("3%", 1000), headroom_bytes("1KiB", 4096), headroom_bytes(0, 4096)
        (30, 1024, 0)
    """
    kind, value = _parse_headroom(headroom)
    size = round(value * total_bytes) if kind == "share" else int(value)
    if size >= total_bytes:
        raise UsageError(
            f"headroom {headroom!r} is {format_bytes(size)} and leaves nothing of {whose} "
            f"{format_bytes(total_bytes)}; take a smaller one, such as '2%'"
        )
    return size


def check_headroom(headroom: str | float) -> None:
    """Refuse a headroom that no card could give a meaning; raises `UsageError`."""
    _parse_headroom(headroom)


def _parse_headroom(headroom: str | float) -> tuple[str, float]:
    """Tell a share from bytes: a percent sign or a float says share, anything else bytes."""
    if isinstance(headroom, float) or (isinstance(headroom, str) and headroom.rstrip().endswith("%")):
        return "share", parse_fraction(headroom, name="headroom")
    try:
        return "bytes", parse_bytes(headroom, name="headroom")
    except UsageError as error:
        # '3' was often meant as '3%'; a number that no percentage can be was not.
        percentage = headroom.strip() if isinstance(headroom, str) and headroom.strip() in _PERCENTAGES else "3"
        raise UsageError(f"{error}, or a percentage of the card like '{percentage}%'") from None
