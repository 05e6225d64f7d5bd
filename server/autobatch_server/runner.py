"""Runs probes: one thread for each slot, which takes a lease, starts a child and watches over both."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from sqlalchemy import delete, func, insert, select

from autobatch import AutobatchError, ProbeOptions, Report, find_presence, to_json_form
from autobatch.store import NewMeasurement, StoreUnavailableError
from autobatch_server.execution import ProbeTask, end_orphans
from autobatch_server.gpus import canonical_gpu
from autobatch_server.queue import Claim, Slot
from autobatch_server.tables import runner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autobatch import Presence, PresentCard
    from autobatch.store import Database
    from autobatch_server.execution import Executor
    from autobatch_server.queue import ProbeQueue
    from autobatch_server.settings import Settings
    from autobatch_server.workloads import WorkloadCatalogue

__all__ = ["Runner", "RunnerBoard", "find_slots"]

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0  # between looks into the queue where nobody says that something came
_GLANCE_SECONDS = 0.2  # between looks at a child
_AWAY_SECONDS = 1.0  # between attempts while the database is away
_TIDY_SECONDS = 3600.0

EndState = Literal["succeeded", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class _Ending:
    """How a run ended."""

    state: EndState | Literal["died", "stopped", "lost"]
    problem: Mapping[str, str] | None = None
    report: Report | None = None


@dataclass
class _House:
    """When the next of each chore is due, by the monotonic clock."""

    pause: float
    recovers_at: float = 0.0
    announces_at: float = 0.0
    tidies_at: float = 0.0


def find_slots(settings: Settings) -> tuple[Slot, ...]:
    """The places on this machine where probes can run: each of its GPUs, and those for emulated cards."""
    host = socket.gethostname()
    slots = [
        Slot(name=f"{host}/emulated-{number}/{os.getpid()}", basis="emulated", gpu=None)
        for number in range(settings.emulated_slots)
    ]
    if settings.real_gpus:
        presence = find_presence()
        slots += [
            Slot(name=f"{host}/{card.uuid}", basis="measured", gpu=canonical_gpu(card.name, strict=False))
            for card in _visible(presence)
        ]
    return tuple(slots)


def _visible(presence: Presence) -> list[PresentCard]:
    """The GPUs that can be used and that `CUDA_VISIBLE_DEVICES` does not hide."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not presence.usable or named is None:
        return list(presence.cards) if presence.usable else []
    words = [word.strip() for word in named.split(",")]
    return [
        card
        for index, card in enumerate(presence.cards)
        if any(word == str(index) or (word.startswith("GPU-") and card.uuid.startswith(word)) for word in words)
    ]


def _tell_nobody(state: str, basis: str, seconds: float) -> None:
    """Nobody counts the ends."""


class RunnerBoard:
    """Which runners there are, over all machines of one database."""

    def __init__(self, database: Database, *, stale_seconds: float) -> None:
        """Take the database; a runner not seen for `stale_seconds` counts as gone."""
        self._database = database
        self._stale = stale_seconds

    def announce(self, runner_id: str, slots: Sequence[Slot]) -> None:
        """Say that a runner is there."""
        form = json.dumps([dataclasses.asdict(slot) for slot in slots])
        with self._database.write() as connection:
            connection.execute(
                delete(runner).where(
                    (runner.c.id == runner_id) | (runner.c.seen_at < self._database.now() - 10 * self._stale)
                )
            )
            connection.execute(
                insert(runner).values(
                    id=runner_id, host=socket.gethostname(), slots_json=form, seen_at=self._database.now()
                )
            )

    def leave(self, runner_id: str) -> None:
        """Say that a runner is gone."""
        with self._database.write() as connection:
            connection.execute(delete(runner).where(runner.c.id == runner_id))

    def seconds_since_seen(self, host: str) -> float | None:
        """How long ago a runner of a host last gave a sign of life; None where none did."""
        with self._database.read() as connection:
            age = self._database.now() - func.max(runner.c.seen_at)
            seconds = connection.execute(select(age).where(runner.c.host == host)).scalar_one()
        return None if seconds is None else max(0.0, float(seconds))

    def slots(self) -> list[Slot]:
        """The slots of every runner that is there."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(runner.c.slots_json).where(runner.c.seen_at > self._database.now() - self._stale)
            ).all()
        return [Slot(**slot) for row in rows for slot in json.loads(row.slots_json)]


class Runner:
    """The runner of one process.

    A context manager: on the way out running probes go back into the queue, and their children are ended.
    """

    def __init__(
        self,
        queue: ProbeQueue,
        board: RunnerBoard,
        catalogue: WorkloadCatalogue,
        executor: Executor,
        find_slots: Callable[[], Sequence[Slot]],
        settings: Settings,
        *,
        on_end: Callable[[str, str, float], None] | None = None,
    ) -> None:
        """Prepare it.

        Args:
            queue: the probes.
            board: where runners announce themselves.
            catalogue: the workloads.
            executor: what starts a run.
            find_slots: gives the places where probes can run now; one thread serves each. Asked again every third of a
                lease, since nodes come and go.
            settings: deadlines and the like.
            on_end: told of each end: state, basis, seconds.
        """
        self.id = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._queue, self._board, self._catalogue, self._executor = queue, board, catalogue, executor
        self._find_slots, self._settings = find_slots, settings
        self._slots: dict[str, Slot] = {}
        self._on_end = on_end or _tell_nobody
        self._stop = threading.Event()
        self._arrived = threading.Condition()
        self._news = 0  # how often something was said to have come: nothing said between a look and the wait is missed
        self._threads: dict[str, threading.Thread] = {}
        self._house = threading.Thread(target=self._keep_house, name="runner house")

    def __enter__(self) -> Self:
        orphans = end_orphans()
        if orphans:
            _LOG.warning("ended %d processes that a killed runner left behind", orphans)
        self._look_for_slots()
        self._announce()
        self._house.start()
        return self

    def __exit__(self, *ending: object) -> None:
        self._stop.set()
        self.notify()
        self._house.join()
        for thread in self._threads.values():
            thread.join()
        try:
            self._board.leave(self.id)
        except StoreUnavailableError:
            _LOG.warning("the database is away: the runner's entry stays until it is stale")

    def notify(self) -> None:
        """Say that something came into the queue, or that something is to be cancelled."""
        with self._arrived:
            self._news += 1
            self._arrived.notify_all()

    # ---- threads ----------------------------------------------------------------------------------------------------

    def _look_for_slots(self) -> None:
        """Serve what came, and nothing more of what is gone; a probe that runs there still comes to its end.

        The children die with the thread that started them, so a slot's thread lives as long as the slot.
        """
        self._slots = {slot.name: slot for slot in self._find_slots()}
        self._threads = {name: thread for name, thread in self._threads.items() if thread.is_alive()}
        for slot in self._slots.values():
            if slot.name not in self._threads:
                thread = threading.Thread(target=self._serve, args=(slot,), name=f"runner {slot.name}")
                self._threads[slot.name] = thread
                thread.start()

    def _announce(self) -> None:
        try:
            self._board.announce(self.id, list(self._slots.values()))
        except StoreUnavailableError:
            _LOG.warning("the database is away: the runner announces itself later")

    def _keep_house(self) -> None:
        """Take back what dead runners held, and say that this one lives."""
        house = _House(pause=min(_LOOK_SECONDS, self._settings.lease / 4))
        while not self._stop.wait(house.pause):
            try:
                self._clean_up(house)
            except StoreUnavailableError:
                # Leases ran out because nobody could renew them: first those who live renew theirs, then what is left is taken.
                house.recovers_at = time.monotonic() + self._settings.lease
                self._stop.wait(_AWAY_SECONDS)
            except Exception:  # noqa: BLE001 - the thread's boundary: it is logged, and the thread lives on
                _LOG.exception("the runner's housekeeping failed; it goes on")
                self._stop.wait(_AWAY_SECONDS)

    def _clean_up(self, house: _House) -> None:
        now = time.monotonic()
        if now < house.recovers_at:
            self._queue.count()  # so that it is known when the database is away again
        elif recovered := self._queue.recover():
            _LOG.warning("took back %d probes whose runners gave no sign of life", recovered)
            self.notify()
        if now >= house.announces_at:
            self._look_for_slots()
            self._announce()
            house.announces_at = now + self._settings.lease / 3
        if now >= house.tidies_at:
            self._queue.tidy(keep_events_seconds=self._settings.keep_events)
            house.tidies_at = now + _TIDY_SECONDS

    def _serve(self, slot: Slot) -> None:
        while not self._stop.is_set() and self._slots.get(slot.name) == slot:
            news = self._news
            try:
                claim = self._queue.claim(slot, self.id)
            except StoreUnavailableError:
                self._stop.wait(_AWAY_SECONDS)
                continue
            except Exception:  # noqa: BLE001 - the thread's boundary: it is logged, and the thread lives on
                _LOG.exception("looking into the queue failed; it is looked at again")
                self._stop.wait(_AWAY_SECONDS)
                continue
            if claim is None:
                with self._arrived:
                    self._arrived.wait_for(lambda seen=news: self._news != seen, _LOOK_SECONDS)  # type: ignore[misc]
                continue
            self._run(claim)

    def _run(self, claim: Claim) -> None:
        """Run one probe to its end, whatever happens."""
        started = time.monotonic()
        context = {"probe_id": claim.record.id, "attempt": claim.record.attempts}
        _LOG.info("probe started", extra=context)
        try:
            ending = self._watch(claim)
        except Exception:  # noqa: BLE001 - the thread's boundary: whatever failed, the probe must have an end
            _LOG.exception("the runner failed", extra=context)
            ending = _Ending(state="died", problem={"code": "runner-failed", "detail": _detail("runner-failed")})
        written = self._settle(claim, ending)
        seconds = time.monotonic() - started
        _LOG.info("probe ended: %s after %.1f s", ending.state, seconds, extra=context)
        if written and ending.state in {"succeeded", "failed", "cancelled"}:
            self._on_end(ending.state, claim.record.order.basis, seconds)

    def _watch(self, claim: Claim) -> _Ending:
        try:
            task = self._task(claim)
        except (AutobatchError, ValueError) as error:
            _LOG.warning("the probe cannot be run: %s", error, extra={"probe_id": claim.record.id})
            return _Ending(state="failed", problem={"code": "workload-gone", "detail": _detail("workload-gone")})
        lease = _LeaseKeeper(self._queue, claim, self._settings.lease)
        deadline = float(task.options["deadline"])
        ends_at = time.monotonic() + deadline + 5.0  # the library itself ends on time; this is for what hangs
        with self._executor.start(task) as execution:
            while True:
                message = execution.next_message(_GLANCE_SECONDS)
                held = lease.keep(message)
                if held != "held":
                    return _Ending(state="cancelled" if held == "cancel" else "lost")
                if message is not None and (ending := self._ending_of(message, claim)) is not None:
                    return ending
                if self._stop.is_set():
                    return _Ending(state="stopped")
                if time.monotonic() > ends_at:
                    detail = f"the probe took longer than its deadline of {deadline:g} s"
                    return _Ending(state="failed", problem={"code": "deadline-passed", "detail": detail})

    def _task(self, claim: Claim) -> ProbeTask:
        order = claim.record.order
        workload = self._catalogue.find(order.workload)
        asked = dict(order.options)
        deadline = min(float(asked.pop("deadline", self._settings.probe_deadline)), self._settings.probe_deadline)
        options = ProbeOptions(
            **asked,
            emulate=order.gpu if order.basis == "emulated" else None,
            deadline=deadline,
            trial_timeout=min(self._settings.trial_timeout, deadline),
        )
        form = to_json_form(options)
        if not isinstance(form, dict):
            raise TypeError("options have an object as their JSON form")
        # By its UUID the one card is the child's cuda:0, whatever order CUDA would number the cards in.
        visible = {"CUDA_VISIBLE_DEVICES": claim.slot.rpartition("/")[2]} if order.basis == "measured" else {}
        return ProbeTask(
            claim=claim,
            library_workload=self._catalogue.library_name(workload),
            options=form,
            environment=visible,
        )

    def _ending_of(self, message: Mapping[str, Any], claim: Claim) -> _Ending | None:
        """How the run ended by this message; None where it goes on."""
        context = {"probe_id": claim.record.id}
        if "report" in message:
            return _Ending(state="succeeded", report=Report.from_dict(message["report"]))
        if "problem" in message:
            problem = message["problem"]
            # What the job said may hold paths and secrets: the log has it, the asker a code and a sentence of ours.
            _LOG.warning(
                "probe failed: %s: %s",
                problem["code"],
                problem["message"],
                extra={**context, "trace": problem["trace"]},
            )
            return _Ending(state="failed", problem={"code": problem["code"], "detail": _detail(problem["code"])})
        if "over_memory" in message:
            used, limit = message["over_memory"]["used_bytes"], message["over_memory"]["limit_bytes"]
            detail = f"its processes used {used} bytes of host memory, the limit is {limit}"
            return _Ending(state="failed", problem={"code": "host-memory", "detail": detail})
        if "gone" in message:
            _LOG.warning("the place where the probe was to run is gone: it waits for another", extra=context)
            self._slots.pop(claim.slot, None)  # until it is found again
            return _Ending(state="stopped")
        if "died" in message:
            _LOG.warning("the probe's process died: %s", message["died"], extra=context)
            return _Ending(state="died", problem={"code": "runner-lost", "detail": _detail("runner-lost")})
        return None

    def _settle(self, claim: Claim, ending: _Ending) -> bool:
        """Write the end down, and say whether it counts: the lease decides. While the database is away it is tried again."""
        context = {"probe_id": claim.record.id}
        while True:
            try:
                written = self._write(claim, ending)
            except StoreUnavailableError:
                if self._stop.wait(_AWAY_SECONDS):
                    _LOG.warning("shut down while the database is away", extra=context)
                    return False
                continue
            except Exception:  # noqa: BLE001 - the thread's boundary: the lease runs out, and the probe is run anew
                _LOG.exception("the end of a probe could not be written", extra=context)
                return False
            if not written:
                _LOG.warning("the lease was lost: what this run found is dropped", extra=context)
            return written

    def _write(self, claim: Claim, ending: _Ending) -> bool:
        if ending.state == "lost":
            return False
        if ending.state == "stopped":
            return self._queue.give_back(claim)
        problem = ending.problem or {"code": "runner-lost", "detail": _detail("runner-lost")}
        if ending.state == "died":
            return self._queue.lose(claim, problem)
        order, measurement = claim.record.order, None
        if ending.report is not None:
            report = dataclasses.replace(ending.report, workload=order.workload)
            measurement = NewMeasurement.of(report, workload=order.workload, gpu=order.gpu, source="probe")
        return self._queue.finish(claim, ending.state, problem=ending.problem, measurement=measurement)


class _LeaseKeeper:
    """Renews a lease in time and writes events down, both put off while the database is away."""

    def __init__(self, queue: ProbeQueue, claim: Claim, lease_seconds: float) -> None:
        self._queue, self._claim = queue, claim
        self._pause = min(lease_seconds / 4, 0.5)  # half a second, so that a cancelled probe ends soon
        self._renewed = time.monotonic()
        self._events: list[tuple[str, Mapping[str, Any]]] = []

    def keep(self, message: Mapping[str, Any] | None) -> Literal["held", "cancel", "lost"]:
        """Do what is due; `cancel` and `lost` say that the run is to end."""
        if message is not None and "event" in message:
            event = dict(message["event"])
            self._events.append((str(event.pop("kind")), event))
        try:
            if self._events:
                if not self._queue.add_events(self._claim, self._events):
                    return "lost"
                self._events.clear()
            if time.monotonic() - self._renewed < self._pause:
                return "held"
            held = self._queue.renew(self._claim)
        except StoreUnavailableError:
            return "held"  # nobody else can take it either
        self._renewed = time.monotonic()
        return held


_DETAILS = {
    "bad-request": "the workload or an option was refused; the service's log says why",
    "busy": "the GPU is taken by others, or the deadline passed",
    "emulator": "the emulated card could not be started, or lacks a call that the job makes; the log says which",
    "no-gpu": "the runner sees no GPU that can be measured",
    "no-plan": "the target cannot be hit under this split",
    "runner-failed": "the runner itself failed; the service's log says why",
    "runner-lost": "the process that ran it was killed, in each attempt",
    "unavailable": "something that the probe needs is not there; the service's log says what",
    "workload-failed": "the training job failed for a reason other than device memory; the service's log says why",
    "workload-gone": "the workload or its parameters are no longer in the operator's file",
}


def _detail(code: str) -> str:
    return _DETAILS.get(code, "the probe failed; the service's log says why")
