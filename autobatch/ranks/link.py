"""A side channel between ranks, in host memory, by which they agree whatever the GPUs are doing."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from autobatch.errors import WorkloadError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    import torch

__all__ = ["RankLink", "num_ranks"]

# Waiting is done in sleeps, between which Ctrl-C is heard.
_LONGEST_PAUSE_SECONDS = 0.2
# Ranks that find the channel broken are given so long to say so; who does not is the one that broke it.
_ROLL_CALL_SECONDS = 5.0
_LINGER_SECONDS = 1.0
_numbers = itertools.count()
_ALL = "all are here"


def num_ranks() -> int:
    """Ranks that this process trains with by `torch.distributed`; 1 where it trains alone."""
    import sys

    dist = sys.modules.get("torch.distributed")  # imported by whoever made a process group
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return 1
    return int(dist.get_world_size())


class RankLink:
    """The ranks of the default process group, tied by a gloo group of its own.

    A context manager, entered and left by every rank as often. It uses no GPU and moves no data of the job, so it works while
    collectives wait.
    """

    def __init__(self, timeout_seconds: float | None) -> None:
        """Prepare it; nothing is opened yet.

        Args:
            timeout_seconds: how long ranks wait for each other; None for a day.
        """
        import torch.distributed as dist

        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()
        self._timeout = 86400.0 if timeout_seconds is None else timeout_seconds
        self._number = next(_numbers)
        self._calls = 0
        self._group: Any = None
        self._talking = threading.local()
        self._store: Any = None
        self._broken: WorkloadError | None = None

    def __enter__(self) -> Self:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        # What the ranks met by at their start, under names of this link's own.
        self._store = PrefixStore(f"autobatch/{self._number}", _get_default_store())
        self._arrive()
        try:
            with self.talking():
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise self._explain(error, 0.0) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the group: ranks that still wait on it hear that this one is gone."""
        import torch.distributed as dist

        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(Exception):  # a group that broke may not close either
                dist.destroy_process_group(group)

    @property
    def is_talking(self) -> bool:
        """Whether this thread is within a call of the link, whose own collectives are not the job's."""
        return getattr(self._talking, "depth", 0) > 0

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Mark what runs within as the link's own, and keep the job's modes of dispatch out of it."""
        from torch.utils._python_dispatch import _disable_current_modes

        self._talking.depth = getattr(self._talking, "depth", 0) + 1
        try:
            with _disable_current_modes():
                yield
        finally:
            self._talking.depth -= 1

    def exchange(self, mine: object) -> list[Any]:
        """Give every rank what each says, in their order; all must call it.

        Args:
            mine: anything that can be pickled.

        Raises:
            WorkloadError: a rank is gone, or did not come in time; it is named.
        """
        import torch

        said = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        lengths = [numbers[0] for numbers in self.compare(len(said))]
        padded = torch.nn.functional.pad(said, (0, max(lengths) - len(said)))
        parts = self._gather(padded).split(max(lengths))
        return [pickle.loads(bytes(part[:length].tolist())) for part, length in zip(parts, lengths, strict=True)]  # noqa: S301 - what this job's own processes wrote

    def compare(self, *mine: int) -> list[list[int]]:
        """Give every rank the few small numbers of each, at the cost of one round; all must call it with as many.

        Raises:
            WorkloadError: as `exchange`.
        """
        import torch

        with torch.inference_mode(mode=False), self.talking():
            numbers = torch.tensor(mine, dtype=torch.int64, device="cpu")
        flat: list[int] = self._gather(numbers).tolist()
        return [flat[start : start + len(mine)] for start in range(0, len(flat), len(mine))]

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks behind each other.

        Raises:
            WorkloadError: a rank is gone, or did not come in time.
        """
        import torch
        import torch.distributed as dist

        if self._broken is not None:
            raise self._broken
        self._calls += 1
        began = time.monotonic()
        try:
            with self.talking(), torch.no_grad():
                gathered = torch.empty(self.world_size * len(mine), dtype=mine.dtype, device="cpu")
                work: Any = dist.all_gather_into_tensor(gathered, mine, group=self._group, async_op=True)
                _wait(work)
                work.wait()
        except RuntimeError as error:  # the backend's errors are no kind of their own
            self._broken = self._explain(error, time.monotonic() - began)
            raise self._broken from error
        return gathered

    # ---- who is missing ---------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        """Wait until every rank is here.

        Raises:
            WorkloadError: one did not come in time.
        """
        try:
            self._store.set(f"here/{self.rank}", "")
            if self._store.add("here", 1) == self.world_size:
                self._decide(_ALL)
            verdict = self._verdict(self._timeout)
            if verdict == _ALL:
                return
            time.sleep(_LINGER_SECONDS)  # so that the others hear it before the store goes with the rank that keeps it
        except RuntimeError as error:  # the errors of a store are no kind of their own
            raise WorkloadError(
                "the store that the ranks met by is gone: rank 0, or the launcher, which keeps it, ended while they waited for "
                "each other; what it printed says why"
            ) from error
        raise WorkloadError(
            f"{verdict}: every rank must call it, with the same arguments and as often; trial_timeout is how long they wait for "
            "each other"
        )

    def _verdict(self, seconds: float) -> str:
        """Wait until all are here, or one gave up, by asking: a wait of the store's own does not hear Ctrl-C."""
        deadline = time.monotonic() + seconds
        pause = 0.001
        while not self._store.check(["verdict"]):
            if time.monotonic() > deadline:
                return self._decide(f"{_ranks(self._without('here'))} did not come to the probe within {seconds:g} s")
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.5)
        return str(self._store.get("verdict").decode())

    def _decide(self, verdict: str) -> str:
        """Say for all whether they begin; the first to say so is right, and a rank that comes later hears it."""
        return str(self._store.compare_set("verdict", "", verdict).decode())

    def _explain(self, error: Exception, waited_seconds: float) -> WorkloadError:
        """Find out by a roll call who is not there."""
        import torch.distributed as dist

        group, self._group = self._group, None
        with contextlib.suppress(Exception):  # closing it tells those that wait for this rank
            dist.destroy_process_group(group)
        missing: list[int] = []
        with contextlib.suppress(Exception):  # the store may be gone with the rank that kept it
            self._store.set(f"call {self._calls}/{self.rank}", "")
            deadline = time.monotonic() + _ROLL_CALL_SECONDS
            while (missing := self._without(f"call {self._calls}")) and time.monotonic() < deadline:
                time.sleep(0.05)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not missing:
            return WorkloadError(f"the ranks lost each other, and none is missing by name: {first}")
        if waited_seconds >= self._timeout:
            return WorkloadError(
                f"{_ranks(missing)} did not answer within {self._timeout:g} s: stuck, or elsewhere than the others, as "
                "where a collective is of some ranks only; trial_timeout is how long they wait for each other"
            )
        return WorkloadError(f"{_ranks(missing)} ended while the others waited for it: what it printed says why")

    def _without(self, key: str) -> list[int]:
        return [rank for rank in range(self.world_size) if not self._store.check([f"{key}/{rank}"])]


def _wait(work: Any) -> None:
    """Wait for a collective in short sleeps, between which Ctrl-C is heard: soon over, as a rule."""
    pause = 0.0
    while not work.is_completed():
        time.sleep(pause)
        pause = min(0.02, pause * 1.2 + 1e-5)


def _ranks(numbers: Sequence[int]) -> str:
    """`rank 3`, `ranks 1 and 3`, `ranks 1, 2, 5 and 40 more`; `a rank` for none by name."""
    if not numbers:  # the last of them came between two looks
        return "a rank"
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 4:
        return f"ranks {', '.join(map(str, numbers[:3]))} and {len(numbers) - 3} more"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
