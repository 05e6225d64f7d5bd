"""Random generators as they were when a window began."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from autobatch.snapshot.process import other_generators, torch_generators

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch.snapshot.process import Generator

__all__ = ["KeptGenerators", "unchanged_generators"]

LOOK_EVERY = 64


class KeptGenerators:
    """States of the random generators that a window may draw from, to be put back.

    torch's are read at every window. Reading numpy's and Python's takes many times as long (each has 624 words of state, which
    becomes objects of Python), and few models draw from them: they are read at the first window and every 64th, and at each one
    from the first that was seen to draw from them.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._windows = 0
        self._drawn_from: set[str] = set()
        self._torch: list[tuple[Generator, Any]] = []
        self._others: list[tuple[Generator, Any]] = []

    def keep(self) -> None:
        """Keep the states as they are now."""
        self._torch = [(one, one[1]()) for one in torch_generators()]
        self._others = []
        looks = self._windows % LOOK_EVERY == 0
        if looks or self._drawn_from:
            self._others = [(one, one[1]()) for one in other_generators() if looks or one[0] in self._drawn_from]
        self._windows += 1

    def end(self) -> None:
        """Note which of the generators outside of torch the window drew from, where it was looked at."""
        for (name, read, _), state in self._others:
            if name not in self._drawn_from and _plain(state) != _plain(read()):
                self._drawn_from.add(name)

    def put_back(self) -> None:
        """Put the kept states back."""
        for (_, _, write), state in (*self._others, *self._torch):
            write(state)


@contextlib.contextmanager
def unchanged_generators() -> Iterator[None]:
    """Put every random generator back at the end as it was at the beginning."""
    kept = KeptGenerators()
    kept.keep()
    try:
        yield
    finally:
        kept.put_back()


def _plain(state: Any) -> list[object]:
    """A state in which numpy's arrays are lists, which compare as a whole."""
    return [value.tolist() if hasattr(value, "tolist") else value for value in state]
