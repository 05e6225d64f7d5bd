"""Text in a picture: how wide it is, where it breaks, and where labels go that would overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "SMALL_POINTS",
    "TEXT_POINTS",
    "TITLE_POINTS",
    "drawable",
    "shortened",
    "spread",
    "text_width",
    "wrapped",
]

# At 800 pixels across, the width of the picture, 8 points are 11 pixels.
TITLE_POINTS, TEXT_POINTS, SMALL_POINTS = 11.0, 8.5, 7.5


def spread(wanted: Sequence[float], widths: Sequence[float], low: float, high: float) -> list[float]:
    """Move labels apart that would overlap, each as little as their sum of squares allows.

    Each label's place less the widths before it must not fall from one label to the next, so this is a regression
    under an order: neighbours out of order share their mean, until none are (pool adjacent violators, linear time).

    Args:
        wanted: the labels' centres, in ascending order.
        widths: what each takes, its gap included.
        low: where the first may begin at the earliest.
        high: where the last must end, unless all together are longer.

    Returns:
        The centres to draw at.
    """
    offsets = [sum(widths[:index]) + width / 2 for index, width in enumerate(widths)]
    pools: list[tuple[float, int]] = []
    for centre, offset in zip(wanted, offsets, strict=True):
        mean, count = centre - offset, 1
        while pools and pools[-1][0] > mean:
            before, number = pools.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        pools.append((mean, count))
    starts = [mean for mean, count in pools for _ in range(count)]
    last = max(low, high - sum(widths))
    return [min(max(start, low), last) + offset for start, offset in zip(starts, offsets, strict=True)]


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Measure a text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(drawable(text), font, False)[0])


def drawable(text: str) -> str:
    """Replace what the font has no letter for, line ends and other controls among it: drawing it would warn."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    return "".join(letter if letter.isprintable() and ord(letter) in known else "\ufffd" for letter in text)


def shortened(text: str, size: float, room: float) -> str:
    """Cut a text at its end to fit."""
    kept = len(text)
    while kept and text_width(shown := text if kept == len(text) else f"{text[:kept].rstrip()}…", size) > room:
        kept -= max(1, kept // 40)
    return shown if kept else "…"


def wrapped(text: str, size: float, room: float) -> list[str]:
    """Break a text into lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and text_width(longer, size) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
