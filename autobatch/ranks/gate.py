"""A gate before every collective of a job: no rank enters one that another will not enter."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self

from autobatch.errors import WorkloadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import torch

    from autobatch.ranks.link import RankLink

__all__ = ["CollectiveGate", "StoppedAtGateError"]

# The collectives of torch.distributed as the dispatcher knows them, under which DDP's reducer in C++, FSDP2, functional
# collectives and a caller's own all end. Source: torch/csrc/distributed/c10d/Ops.cpp.
_COLLECTIVES = (
    "broadcast_",
    "allreduce_",
    "allreduce_coalesced_",
    "allgather_",
    "_allgather_base_",
    "allgather_coalesced_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_",
    "reduce_",
    "gather_",
    "scatter_",
    "alltoall_",
    "alltoall_base_",
    "barrier",
)


class StoppedAtGateError(RuntimeError):
    """A collective was not begun, because another rank's trial is over."""


class _Place(IntEnum):
    """Where a rank stands when it meets the others."""

    COLLECTIVE = 0
    END = 1
    END_FAILED = 2


class CollectiveGate:
    """Lets the ranks of a trial into each collective together, and out of the trial together.

    A rank that runs out of memory would leave the others waiting in a collective that it never enters, for ever. Here every
    rank says in host memory that it is about to enter one, and waits for the others to say so: where one says that its trial
    failed instead, none enters, and in each the collective raises `StoppedAtGateError` as if it had failed itself. Collectives
    that were entered were entered by all, so that they end.

    A context manager around one trial of a rank; all ranks hold one, and all call `finish`. It stands in the dispatcher, before
    the collective's own kernel, so that nothing of the job is changed. What a collective allocates before it comes to the
    dispatcher is covered; not covered is what a communicator allocates within it (at its first use, or for lists of tensors).
    Cost: one round of a few bytes between all ranks for each collective, and nothing for other operators.
    """

    def __init__(self, link: RankLink) -> None:
        self._link = link
        self._library: torch.library.Library | None = None
        self.stopped = ""
        """Why this rank was stopped; empty where it was not."""

    def __enter__(self) -> Self:
        import torch

        # Above every backend, and above nothing else: these operators have no kernel for autograd of their own.
        self._library = torch.library.Library("c10d", "IMPL")
        for name in _COLLECTIVES:
            operator = getattr(torch.ops.c10d, name, None)  # some came later than others
            if operator is not None:
                self._library.impl(name, self._guarded(operator.default), "Autograd")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the gate away again."""
        library, self._library = self._library, None
        if library is not None:
            library._destroy()  # noqa: SLF001 - else only when the last reference goes

    def finish(self, *, failed: bool) -> None:
        """End this rank's trial, and wait until all have ended theirs; those at a collective are stopped.

        Args:
            failed: whether it did not come to its end as it should.

        Raises:
            WorkloadError: a rank is gone; or a rank's trial ended well while others waited in a collective.
        """
        mine = _Place.END_FAILED if failed or self.stopped else _Place.END
        while True:
            places = self._meet(mine)
            waiting = [rank for rank, place in enumerate(places) if place is _Place.COLLECTIVE]
            if not waiting:
                break
            if _Place.END_FAILED not in places:
                self.stopped = self._out_of_step(places)
                mine = _Place.END_FAILED
        if self.stopped.startswith(_OUT_OF_STEP):
            raise WorkloadError(self.stopped)

    def _guarded(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        def enter(*arguments: Any, **named: Any) -> Any:
            if not self._link.is_talking:
                self._pass()
            with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001 - how kernels of autograd in Python go on
                return operator(*arguments, **named)

        return enter

    def _pass(self) -> None:
        """Wait for the others before a collective.

        Raises:
            StoppedAtGateError: another's trial is over.
        """
        if not self.stopped:
            places = self._meet(_Place.COLLECTIVE)
            if all(place is _Place.COLLECTIVE for place in places):
                return
            failed = [rank for rank, place in enumerate(places) if place is _Place.END_FAILED]
            self.stopped = f"rank {failed[0]} ended the trial" if failed else self._out_of_step(places)
        raise StoppedAtGateError(self.stopped)

    def _meet(self, place: _Place) -> list[_Place]:
        return [_Place(numbers[0]) for numbers in self._link.compare(place)]

    def _out_of_step(self, places: list[_Place]) -> str:
        ended = next(rank for rank, place in enumerate(places) if place is not _Place.COLLECTIVE)
        waits = next(rank for rank, place in enumerate(places) if place is _Place.COLLECTIVE)
        return (
            f"{_OUT_OF_STEP}: rank {ended} ended its trial while rank {waits} came to one more collective: every rank must run "
            "as many micro-batches and call the same collectives"
        )


_OUT_OF_STEP = "the ranks are out of step"
