"""What was decided about Pods, so that all Pods of a job are told the same, and the decisions that are still being made."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine, Hashable

    from autobatch import Card, Plan
    from autobatch_server.schemas import BasisName

__all__ = ["Admissions", "Chosen"]

_MOST_JOBS = 10_000


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A plan, and the cards that it is known to fit on."""

    plan: Plan
    cards: tuple[Card, ...]
    basis: BasisName
    measurement: str


class Admissions:
    """The decisions of one process.

    Ranks in several Pods must have one plan, whatever is measured between the first of them and the last.
    """

    def __init__(self) -> None:
        self._chosen: OrderedDict[Hashable, Chosen] = OrderedDict()
        self._going_on: set[asyncio.Task[Any]] = set()
        self.reading = asyncio.Lock()
        """Held while measurements are read, so that a job's many Pods read them once."""

    def get(self, job: Hashable) -> Chosen | None:
        """What a Pod of the job was told; None where none was."""
        found = self._chosen.get(job)
        if found is not None:
            self._chosen.move_to_end(job)
        return found

    def put(self, job: Hashable, chosen: Chosen) -> None:
        """Keep what a Pod of the job is told."""
        self._chosen[job] = chosen
        if len(self._chosen) > _MOST_JOBS:
            self._chosen.popitem(last=False)

    async def within(self, seconds: float, decision: Coroutine[Any, Any, Any]) -> Any:
        """Wait for a decision, which goes on where it takes longer: what it reads answers the next one.

        Raises:
            TimeoutError: it takes longer.
        """
        task = asyncio.ensure_future(decision)
        self._going_on.add(task)
        task.add_done_callback(self._ended)
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise TimeoutError
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._going_on.discard(task)
        if not task.cancelled():
            task.exception()  # seen, so that nobody complains of one that nobody waits for any more
