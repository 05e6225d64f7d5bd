"""What the axes of every picture have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.present.text_layout import TEXT_POINTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from autobatch.present.themes import Theme

__all__ = ["dress_axes", "dress_size_axis"]


def dress_axes(axes: Axes, theme: Theme, *, grid: str, spines: Sequence[str]) -> None:
    """Give axes the theme's ticks, a grid along one of them, and these spines alone."""
    axes.tick_params(colors=theme.muted, labelsize=TEXT_POINTS, length=3)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.6)  # type: ignore[arg-type]  # "x" or "y"
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in spines)
        spine.set_color(theme.muted)
        spine.set_linewidth(0.8)


def dress_size_axis(axes: Axes, theme: Theme, largest: int) -> float:
    """Let x be the micro-batch size, from nought to a little beyond the largest; gives where it ends."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    end = largest + max(0.6, 0.06 * largest)
    axes.set_xlim(0, end)
    # Linear however large the sizes are: memory is nearly affine in them, and only so is that seen.
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.set_xlabel("micro-batch size (samples)", color=theme.ink, fontsize=TEXT_POINTS, labelpad=4)
    return end
