"""Trials that all ranks run together, and that end on all of them at once."""

from __future__ import annotations

import time
import zlib
from typing import TYPE_CHECKING, Protocol

from autobatch.errors import AutobatchError, BusyError, WorkloadError
from autobatch.ranks.agreement import raise_first, weakest, worst
from autobatch.ranks.gate import CollectiveGate
from autobatch.workload.judging import try_beside_tenants

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.facts import AnswerRemarks, DeviceFacts
    from autobatch.ranks.link import RankLink
    from autobatch.trial import Trial

__all__ = ["LocalTrials", "RankTrials"]


class LocalTrials(Protocol):
    """Where one rank runs its part."""

    def prepare(self, size: int) -> None:
        """Do what comes before the first trial."""

    def attempt(self, window: Sequence[int], *, confirmation: bool) -> tuple[Trial, int]:
        """Run a trial here; gives it and the bytes by which others' memory on the device grew meanwhile."""

    def remarks(self) -> AnswerRemarks:
        """What is to be said of the answer."""


class RankTrials:
    """Runs each trial on every rank, and gives all the same answer: that of the rank with which it went worst."""

    def __init__(
        self, local: LocalTrials, link: RankLink, facts: Sequence[DeviceFacts], *, deadline_seconds: float | None = None
    ) -> None:
        """Prepare the trials.

        Args:
            local: this rank's part.
            link: ties the ranks.
            facts: every rank's device.
            deadline_seconds: after which no trial begins; the rank whose clock says so first decides.
        """
        self._local, self._link = local, link
        self._all_facts, self._facts = facts, weakest(facts)
        self.history: list[list[Trial]] = [[] for _ in facts]
        """The trials that each rank brought to an end, in the order in which they ran."""
        self._prepared = False
        self._deadline_seconds = deadline_seconds
        self._deadline = None if deadline_seconds is None else time.monotonic() + deadline_seconds

    @property
    def facts(self) -> DeviceFacts:
        """The device with the least budget of all ranks."""
        return self._facts

    def run_trial(self, window: Sequence[int], *, confirmation: bool) -> Trial:
        """Run one trial on every rank; all must ask for the same window.

        Raises:
            WorkloadError: the job failed on a rank, which is named, but not for want of memory; or a rank is gone.
            BusyError: others kept taking memory, or the deadline passed.
        """
        return self.run_windows((tuple(window),) * self._link.world_size, confirmation=confirmation)

    def run_windows(self, windows: Sequence[tuple[int, ...]], *, confirmation: bool) -> Trial:
        """Run one trial in which each rank has a window of its own, all as long; raises as `run_trial`.

        Returns:
            The trial of the rank with which it went worst; `history` has all of them.
        """
        return try_beside_tenants(lambda: self._attempt(windows, confirmation=confirmation))

    def remarks(self) -> AnswerRemarks:
        """What is to be said of the answer: of this rank's job, as all run the same."""
        return self._local.remarks()

    def _attempt(self, windows: Sequence[tuple[int, ...]], *, confirmation: bool) -> tuple[Trial, int]:
        self._check_next(windows)
        window = windows[self._link.rank]
        if not self._prepared:
            self._prepared = True
            with CollectiveGate(self._link) as gate:
                self._local.prepare(min(window))
                # Whoever is done first ends it for all: a failure shows in the trial that follows.
                gate.finish(failed=True)
        trial, taken, error = self._run_gated(window, confirmation=confirmation)
        answers = self._link.exchange((trial, taken, error))
        raise_first(error, [other for _, _, other in answers])
        trials, growth = [each for each, _, _ in answers], max(taken for _, taken, _ in answers)
        if not growth or all(each is not None and each.fits for each in trials):  # else it is tried again
            for history, each in zip(self.history, trials, strict=True):
                history.extend([each] if each is not None else [])
        return worst(trials, self._all_facts), growth

    def _run_gated(
        self, window: tuple[int, ...], *, confirmation: bool
    ) -> tuple[Trial | None, int, AutobatchError | None]:
        """This rank's trial, None where another's end stopped it; what others took; what went wrong here."""
        trial, growth, error = None, 0, None
        with CollectiveGate(self._link) as gate:
            try:
                trial, growth = self._local.attempt(window, confirmation=confirmation)
            except AutobatchError as raised:
                error = raised
            gate.finish(failed=trial is None or not trial.fits)
        if gate.stopped:  # whatever came of it here came of that
            return None, growth, None
        return trial, growth, error

    def _check_next(self, windows: Sequence[tuple[int, ...]]) -> None:
        """Make sure that all ranks are about to run the same, and that there is time left.

        Raises:
            WorkloadError: they are not.
            BusyError: there is not.
        """
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        said = self._link.compare(zlib.crc32(repr(list(windows)).encode()), is_late)
        if len({chosen for chosen, _ in said}) > 1:
            raise WorkloadError(
                "the ranks decided differently on the same trials, which is a fault of autobatch: please report it"
            )
        late = [rank for rank, (_, is_late) in enumerate(said) if is_late]
        if late:
            raise BusyError(f"the deadline of {self._deadline_seconds:g} s passed on rank {late[0]}: give it more")
