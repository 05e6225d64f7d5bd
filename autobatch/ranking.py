"""Which cards fit a training job: a probe on each, emulated, several in one process."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.child_probe import CardProbes, CardsOfOneMachine
from autobatch.errors import AutobatchError, BusyError, NoGpuError, PlanError, UsageError, WorkloadError
from autobatch.evidence import Evidence
from autobatch.gpu.catalogue import find_card, load_catalogue
from autobatch.options import ProbeOptions
from autobatch.placement import (
    RANK_BY,
    Candidate,
    Placement,
    PlacementTable,
    first_size_on,
    headroom_left,
    in_order,
    parse_candidate,
)
from autobatch.plan import check_int
from autobatch.probing import nothing_fits
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from autobatch.cache.uses import CacheUse
    from autobatch.placement import PlacementVerdict, RankBy
    from autobatch.report import Report

__all__ = ["CardRanked", "placements"]

# Fields of ProbeOptions that a candidate, or the emulation of all of them, decides.
_DECIDED = ("device", "emulate", "world_size")
_MOST_PROCESSES = 4
_Kind = tuple[str, list[Candidate]]  # a card, and how many of it to consider


@dataclass(frozen=True, kw_only=True)
class CardRanked:
    """A candidate is done: what came of it, before all are in order (`rank` 0)."""

    placement: Placement
    done: int
    of: int


def placements(  # noqa: PLR0913 - what each caller may choose
    job: str | Sequence[str],
    *,
    target: int,
    candidates: Iterable[Candidate | str] | None = None,
    rank_by: RankBy = "gpus",
    edits: Sequence[str] = (),
    progress: Callable[[CardRanked], None] | None = None,
    environment: Mapping[str, str] | None = None,
    show_output: bool = False,
    cache: CacheUse = "off",
    processes: int | None = None,
    **options: Any,
) -> PlacementTable:
    """Find out on which cards a training job fits, and with what plan, without any of them.

    Every kind of card is emulated and probed with the plan certified as by `probe_workload`. Several kinds are probed one
    after the other in one process, and what the job took on one says where to begin on the next. A job that does not run on
    any card but its process's first is given processes of its own.

    Args:
        job: a workload's name, or a command with its places, which is started for each trial.
        target: samples per optimizer step, over all cards of a candidate.
        candidates: cards, each with its number and its price where there is one, or names such as `"L4"` and `"L4:4"`; None
            for one of each card of the catalogue.
        rank_by: `"gpus"`, `"cost"` or `"headroom"`.
        edits: as for `probe_command`.
        progress: called with each candidate as it is done, from one thread at a time.
        environment: the children's environment variables; this process's own where None.
        show_output: whether what the job prints goes to standard error.
        cache: as for `probe_workload`; what is remembered of a card counts for every later ranking and probe on it.
        processes: children at once; as many as there are cores where None, up to 4. A command has one.
        **options: further fields of `ProbeOptions` by name, but for the device, the card and the ranks. `deadline` is for the
            ranking as a whole: what is not done by then is `unknown`.

    Returns:
        All candidates, what fits first. A candidate has data-parallel ranks on all its cards, and the figures are those of one
        card: what ranks hold to communicate is not among them, and is said where it is more than what is left.

    Raises:
        UsageError: an argument has no meaning, or a candidate is no card.
        WorkloadError: the job fails on every card, but not for want of memory.
        BusyError: the deadline passed before anything was found out.

    Example:
        >>> table = placements("gpt2", target=256, candidates=["L4:4", "A100-SXM4-40GB"])  # doctest: +SKIP
        >>> [(one.gpu, one.count, one.plan.micro_batch_size) for one in table.placements]  # doctest: +SKIP
        [('A100-SXM4-40GB', 1, 32), ('L4', 4, 16)]
    """
    if rank_by not in RANK_BY:
        raise UsageError(f"rank_by {rank_by!r} is unknown; choose {', '.join(RANK_BY)}")
    if rank_by == "throughput":
        raise UsageError("rank_by 'throughput' needs times, and an emulated card has none: ask a service that has them")
    if decided := sorted(set(options) & set(_DECIDED)):
        raise UsageError(f"{', '.join(decided)} cannot be given to a ranking: each candidate has its own")
    if unknown := sorted(set(options) - {field.name for field in dataclasses.fields(ProbeOptions)}):
        raise UsageError(f"placements() has no option {', '.join(unknown)}")
    if processes is not None:
        check_int("processes", processes, 1)
    wanted = _checked(candidates)
    probes = CardProbes(
        job,
        edits=edits,
        environment=environment,
        show_output=show_output,
        cache=cache,
        options={"target": target, **options},
    )
    ranking = _Ranking(probes, wanted, progress or (lambda _: None), _deadline(probes, wanted[0].gpu))
    ranking.run(1 if probes.is_command else processes or min(_MOST_PROCESSES, os.cpu_count() or 1))
    return PlacementTable(
        workload=probes.name, target=target, rank_by=rank_by, placements=in_order(ranking.results(), rank_by)
    )


def _checked(candidates: Iterable[Candidate | str] | None) -> tuple[Candidate, ...]:
    """Candidates by the names of the catalogue.

    Raises:
        UsageError: one is no card, or there is none.
    """
    if candidates is None:
        return tuple(Candidate(gpu=card.name) for card in load_catalogue())
    if isinstance(candidates, str):
        raise UsageError(f"candidates is the text {candidates!r}: pass a list of them, as in [{candidates!r}]")
    read = [parse_candidate(one) if isinstance(one, str) else _as_candidate(one) for one in candidates]
    named = [dataclasses.replace(one, gpu=find_card(one.gpu).name) for one in read]
    if not named:
        raise UsageError("there is no candidate: name at least one card")
    return tuple(dict.fromkeys(named))


def _deadline(probes: CardProbes, gpu: str) -> float | None:
    """When the ranking is to be over, by the monotonic clock; None without a deadline, or where no trial will run."""
    try:
        limit = probes.options(gpu, 1).deadline
    except PlanError:
        return None
    return None if limit is None else time.monotonic() + limit


def _as_candidate(value: object) -> Candidate:
    if not isinstance(value, Candidate):
        raise UsageError(f"candidate {value!r} is a {type(value).__name__}: give a Candidate, or text such as 'L4:4'")
    return value


class _Ranking:
    """Candidates under way."""

    def __init__(
        self,
        probes: CardProbes,
        candidates: Sequence[Candidate],
        progress: Callable[[CardRanked], None],
        deadline: float | None,
    ) -> None:
        self._probes, self._candidates, self._progress = probes, candidates, progress
        self._deadline = deadline
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._results: dict[Candidate, Placement] = {}
        self._failures: list[AutobatchError] = []
        self._reports: list[Report] = []

    def results(self) -> list[Placement]:
        """What was found, in the order in which candidates were given.

        Raises:
            AutobatchError: nothing was found out of any, for this reason.
        """
        found_out = any(one.verdict in {"fits", "does_not_fit"} for one in self._results.values())
        if self._failures and not found_out:
            raise self._failures[0]
        return [self._results[candidate] for candidate in self._candidates]

    def run(self, processes: int) -> None:
        """Probe on every card, in so many processes at once."""
        kinds: dict[str, list[Candidate]] = {}
        for candidate in self._candidates:
            kinds.setdefault(candidate.gpu, []).append(candidate)
            self._settle_without_probe(candidate)
        left = [gpu for gpu, some in kinds.items() if any(one not in self._results for one in some)]
        processes = min(processes, len(left))
        groups = [[(gpu, kinds[gpu]) for gpu in left[start::processes]] for start in range(processes)]
        if len(groups) <= 1:  # in this thread, where a signal ends it
            for group in groups:
                self._probe_all(group)
            return
        with concurrent.futures.ThreadPoolExecutor(len(groups)) as pool:
            running = [pool.submit(self._probe_all, group) for group in groups]
            try:
                while not all(each.done() for each in running):  # in pieces, between which signals are heard
                    done, _ = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_EXCEPTION)
                    for each in done:
                        each.result()
            finally:
                self._stop.set()
                self._probes.end_children()

    # ---- one candidate ----------------------------------------------------------------------------------------------

    def _settle_without_probe(self, candidate: Candidate) -> None:
        """What needs no trial: a target that cannot be split over so many cards, and what the cache is trusted for."""
        try:
            options = self._probes.options(candidate.gpu, candidate.count)
        except PlanError as error:
            self._note(candidate, "no_plan", str(error))
            return
        except UsageError as error:
            with contextlib.suppress(PlanError):
                self._probes.options(candidate.gpu, 1)  # what has no meaning on one card either has none at all
            self._note(candidate, "no_plan", str(error).partition(";")[0])
            return
        try:
            options.headroom_bytes(find_card(candidate.gpu).nvml_total_bytes)
        except UsageError as error:
            self._note(candidate, "does_not_fit", str(error))
            return
        report = self._probes.trusted(options)
        if report is not None:
            self._note_report(candidate, report)

    def _probe_all(self, group: Sequence[_Kind]) -> None:
        """Probe on every card of a group, in as few processes as the job allows."""
        waiting = deque(group)
        alone = 0  # how many of those that wait come first, each in a machine of its own
        while waiting and not self._stop.is_set():
            number = 1 if alone else min(len(waiting), self._probes.cards_at_once)
            some = [waiting.popleft() for _ in range(number)]
            again = self._probe_some(some)
            waiting.extendleft(reversed(again))
            # What failed beside others may bear no company (a job that names cuda:0), and the rest of them neither.
            alone = len(again) if again else max(0, alone - 1)

    def _probe_some(self, some: Sequence[_Kind]) -> Sequence[_Kind]:
        """Probe on cards that stand in one machine; gives those that have to be tried again, the first of them alone."""
        with self._probes.machine([gpu for gpu, _ in some]) as machine:
            for index, (_, candidates) in enumerate(some):
                for candidate in [one for one in candidates if one not in self._results]:
                    if self._stop.is_set():
                        return ()
                    try:
                        self._probe(machine, index, candidate)
                    except WorkloadError as error:
                        if index or self._stop.is_set():  # a child that was ended from outside says nothing of the job
                            return some[index:]
                        self._fail(candidate, error)
                    if not machine.is_alive:  # the child is gone; of this card there may be other numbers to try
                        is_done = all(one in self._results for one in candidates)
                        return some[index + is_done :]
        return ()

    def _probe(self, machine: CardsOfOneMachine, index: int, candidate: Candidate) -> None:
        """Probe for one candidate.

        Raises:
            WorkloadError: the job failed, not for want of memory; the machine may be of no more use.
        """
        try:
            options = self._probes.options(candidate.gpu, candidate.count)
            asked = dataclasses.replace(options, deadline=self._seconds_left())
            report = machine.probe(index, asked, first=self._first(candidate.gpu))
        except (BusyError, NoGpuError, UsageError) as error:
            self._fail(candidate, error)
        except PlanError as error:
            self._note(candidate, "no_plan", str(error))
        else:
            self._note_report(candidate, dataclasses.replace(report, options=options))

    def _seconds_left(self) -> float | None:
        """Of the deadline; None without one.

        Raises:
            BusyError: none are.
        """
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise BusyError("the deadline had passed before its turn came")
        return left

    def _fail(self, candidate: Candidate, error: AutobatchError) -> None:
        """Note that nothing was found out, and why."""
        with self._lock:
            self._failures.append(error)
        self._note(candidate, "unknown", str(error))

    def _first(self, gpu: str) -> int | None:
        card = find_card(gpu)
        with self._lock:
            return first_size_on(card.cuda_total_bytes, self._reports)

    def _note_report(self, candidate: Candidate, report: Report) -> None:
        with self._lock:
            self._reports.append(report)
        if report.plan is None:
            answer = Evidence(report.trials, budget_bytes=report.memory.budget_bytes).answer(report.options)
            self._note(candidate, "does_not_fit", str(nothing_fits(report)), report, missing=answer.missing_bytes)
        else:
            self._note(candidate, "fits", _why_it_fits(report, counts_ranks=self._probes.is_command), report)

    def _note(
        self,
        candidate: Candidate,
        verdict: PlacementVerdict,
        reason: str,
        report: Report | None = None,
        *,
        missing: int | None = None,
    ) -> None:
        price = candidate.price_per_hour
        placement = Placement(
            rank=0,
            gpu=candidate.gpu,
            count=candidate.count,
            verdict=verdict,
            reason=reason,
            plan=report.plan if report else None,
            basis=report.basis if report else None,
            price_per_hour=None if price is None else price * candidate.count,
            headroom_bytes=headroom_left(report) if report else None,
            missing_bytes=missing,
            report=report,
        )
        with self._lock:
            self._results[candidate] = placement
            self._progress(CardRanked(placement=placement, done=len(self._results), of=len(self._candidates)))


def _why_it_fits(report: Report, *, counts_ranks: bool) -> str:
    """What the plan leaves, and what several cards need besides, where the trials did not run on as many."""
    left = headroom_left(report) or 0
    text = f"a card has {format_bytes(left)} left" if left else "it fits"
    if not report.certified:
        text += "; not certified"
    if report.options.world_size == 1 or counts_ranks:
        return text
    buckets = max((trial.gradient_bytes for trial in report.trials), default=0)
    if buckets > left - report.memory.headroom_bytes:
        return (
            f"{text}; DDP holds the gradients once more, {format_bytes(buckets)}, and does not fit beside it: FSDP2 may"
        )
    return f"{text}, of which DDP takes {format_bytes(buckets)} to hold the gradients once more"
