"""The probes as rows: submitted, leased to a runner under a fencing number, ended exactly once.

A probe is `queued`, then `running` under a lease, then `succeeded`, `failed` or `cancelled`. Whatever a runner writes names the
number of its lease; a lease that ran out is given to another under a higher number, and what the first one still sends is
refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from autobatch.store import generation, new_id
from autobatch_server.tables import event, idempotency, probe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autobatch.store import Database, NewMeasurement

__all__ = [
    "ENDED",
    "Claim",
    "EventRecord",
    "Limits",
    "Order",
    "ProbeQueue",
    "ProbeRecord",
    "QueueFullError",
    "ReusedKeyError",
    "Slot",
    "State",
    "Submission",
]

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
Basis = Literal["measured", "emulated"]

_IDEMPOTENCY_SECONDS = 86400.0


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a probe is to do."""

    workload: str
    """As `str(Workload)` has it."""
    gpu: str
    """The card, by the one name of this service."""
    basis: Basis
    options: Mapping[str, Any]
    """Fields of `ProbeOptions` that are not at their defaults, in JSON's types."""


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """A probe as it stands."""

    id: str
    state: State
    order: Order
    created_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int
    cancel_requested: bool
    token_id: str | None
    measurement_id: str | None
    problem: Mapping[str, str] | None
    """`code` and `detail` of what made it fail."""


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """One thing that happened to a probe."""

    number: int
    """1, 2, … within its probe."""
    at: float
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What became of a submission: a probe, or the measurement that an earlier one with its key was answered with."""

    record: ProbeRecord | None
    measurement_id: str | None
    replayed: bool


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place where one probe at a time can run."""

    name: str
    """Unique over all runners: host and GPU."""
    basis: Basis
    gpu: str | None
    """The one card that it serves; None for an emulated slot, which serves any."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A lease on a probe."""

    record: ProbeRecord
    fence: int
    owner: str
    slot: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the queue."""

    queued: int
    per_token: int


class QueueFullError(Exception):
    """As many probes wait as may."""

    def __init__(self, waiting: int, limit: int, *, of_token: bool) -> None:
        super().__init__(f"{waiting} of {limit}")
        self.waiting, self.limit, self.of_token = waiting, limit, of_token


class ReusedKeyError(Exception):
    """An idempotency key came before with another request."""


class ProbeQueue:
    """The probes of one database."""

    def __init__(self, database: Database, *, lease_seconds: float, max_attempts: int) -> None:
        """Take the database; leases hold for `lease_seconds` after their last sign of life."""
        self._database = database
        self._lease = lease_seconds
        self._max_attempts = max_attempts

    # ---- asked over HTTP --------------------------------------------------------------------------------------------

    def submit(
        self, order: Order, *, principal: str, token_id: str | None, limits: Limits, key: str | None, request: bytes
    ) -> Submission:
        """Put a probe into the queue, or find the one that the same key put there.

        Args:
            order: what to do.
            principal: who asks; keys of one never meet those of another.
            token_id: the token that it counts against.
            limits: how many may wait.
            key: the idempotency key, if any.
            request: the request's body, in a canonical form.

        Raises:
            QueueFullError: too many wait.
            ReusedKeyError: the key came before with another request.
        """
        digest = hashlib.sha256(request).hexdigest()
        with self._database.write() as connection:
            self._one_at_a_time(connection)
            if key is not None and (known := self._find_key(connection, principal, key, digest)):
                return known
            self._check_room(connection, token_id, limits)
            probe_id = new_id("prb")
            now = self._database.now()
            connection.execute(
                insert(probe).values(
                    id=probe_id,
                    state="queued",
                    workload=order.workload,
                    gpu=order.gpu,
                    basis=order.basis,
                    options_json=json.dumps(dict(order.options), sort_keys=True),
                    created_at=now,
                    token_id=token_id,
                )
            )
            self._add_event(connection, probe_id, "queued", {})
            self._keep_key(connection, principal, key, digest, probe_id=probe_id)
            row = connection.execute(select(probe).where(probe.c.id == probe_id)).one()
            return Submission(record=_record(row), measurement_id=None, replayed=False)

    def answer_with(self, measurement_id: str, *, principal: str, key: str | None, request: bytes) -> Submission:
        """Keep that a key was answered with a measurement; raises `ReusedKeyError` as `submit` does."""
        if key is None:
            return Submission(record=None, measurement_id=measurement_id, replayed=False)
        digest = hashlib.sha256(request).hexdigest()
        with self._database.write() as connection:
            self._one_at_a_time(connection)
            if known := self._find_key(connection, principal, key, digest):
                return known
            self._keep_key(connection, principal, key, digest, measurement_id=measurement_id)
        return Submission(record=None, measurement_id=measurement_id, replayed=False)

    def find_replay(self, *, principal: str, key: str, request: bytes) -> Submission | None:
        """Find what an earlier request with this key was answered with; raises `ReusedKeyError`."""
        with self._database.read() as connection:
            return self._find_key(connection, principal, key, hashlib.sha256(request).hexdigest())

    def get(self, probe_id: str) -> ProbeRecord | None:
        """One probe; None where there is none of that id."""
        with self._database.read() as connection:
            row = connection.execute(select(probe).where(probe.c.id == probe_id)).one_or_none()
        return None if row is None else _record(row)

    def list_probes(
        self, *, states: Sequence[State] = (), before: str | None = None, limit: int = 50
    ) -> list[ProbeRecord]:
        """Probes, the newest first, of those states, older than the id `before`."""
        query = select(probe).order_by(probe.c.id.desc()).limit(limit)
        if states:
            query = query.where(probe.c.state.in_(states))
        if before is not None:
            query = query.where(probe.c.id < before)
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(query)]

    def count(self) -> dict[State, int]:
        """How many probes there are in each state."""
        with self._database.read() as connection:
            found = connection.execute(select(probe.c.state, func.count()).group_by(probe.c.state)).all()
        counted = {state: number for state, number in found}  # noqa: C416 - rows are no pairs to a type checker
        return {state: counted.get(state, 0) for state in STATES}

    def events_after(self, probe_id: str, number: int, *, limit: int = 500) -> list[EventRecord]:
        """Events of a probe with higher numbers, in order."""
        query = (
            select(event)
            .where(event.c.probe_id == probe_id, event.c.number > number)
            .order_by(event.c.number)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [
                EventRecord(number=row.number, at=row.at, kind=row.kind, data=json.loads(row.data_json))
                for row in connection.execute(query)
            ]

    def last_event(self, probe_id: str) -> int:
        """The number of a probe's newest event; 0 where there is none any more."""
        with self._database.read() as connection:
            newest = connection.execute(select(func.max(event.c.number)).where(event.c.probe_id == probe_id))
            return int(newest.scalar_one() or 0)

    def cancel(self, probe_id: str) -> ProbeRecord | None:
        """End a queued probe, or ask the runner of a running one to; an ended one stays as it is."""
        with self._database.write() as connection:
            row = connection.execute(select(probe).where(probe.c.id == probe_id).with_for_update()).one_or_none()
            if row is None:
                return None
            if row.state == "queued":
                self._end(connection, probe_id, "cancelled", {})
            elif row.state == "running" and not row.cancel_requested:
                connection.execute(update(probe).where(probe.c.id == probe_id).values(cancel_requested=True))
                self._add_event(connection, probe_id, "cancel_requested", {})
            return _record(connection.execute(select(probe).where(probe.c.id == probe_id)).one())

    # ---- done by runners --------------------------------------------------------------------------------------------

    def claim(self, slot: Slot, owner: str) -> Claim | None:
        """Take the oldest probe that the slot can run; None where there is none, or the slot is taken by another."""
        served = [probe.c.state == "queued", probe.c.basis == slot.basis]
        if slot.gpu is not None:
            served.append(probe.c.gpu == slot.gpu)
        oldest = select(probe.c.id).where(*served).order_by(probe.c.id).limit(1).with_for_update(skip_locked=True)
        # Most looks find nothing: those must not queue up for the one lock of a SQLite file.
        with self._database.read() as connection:
            if connection.execute(select(probe.c.id).where(*served).limit(1)).one_or_none() is None:
                return None
        try:
            with self._database.write() as connection:
                chosen = connection.execute(oldest).scalar_one_or_none()
                if chosen is None:
                    return None
                row = connection.execute(
                    update(probe)
                    .where(probe.c.id == chosen, probe.c.state == "queued")
                    .values(
                        state="running",
                        owner=owner,
                        slot=slot.name,
                        fence=probe.c.fence + 1,
                        attempts=probe.c.attempts + 1,
                        started_at=func.coalesce(probe.c.started_at, self._database.now()),
                        lease_until=self._database.now() + self._lease,
                    )
                    .returning(probe)
                ).one()
                self._add_event(connection, row.id, "started", {"attempt": row.attempts, "slot": slot.name})
        except IntegrityError:  # another process runs a probe on this very GPU
            return None
        return Claim(record=_record(row), fence=row.fence, owner=owner, slot=slot.name)

    def renew(self, claim: Claim) -> Literal["held", "cancel", "lost"]:
        """Hold on to a lease, and hear whether its probe is to be cancelled."""
        with self._database.write() as connection:
            row = connection.execute(
                update(probe)
                .where(*_held_by(claim))
                .values(lease_until=self._database.now() + self._lease)
                .returning(probe.c.cancel_requested)
            ).one_or_none()
        if row is None:
            return "lost"
        return "cancel" if row.cancel_requested else "held"

    def add_events(self, claim: Claim, events: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
        """Write down what happened under a lease; False where it is held no more."""
        with self._database.write() as connection:
            if connection.execute(select(probe.c.id).where(*_held_by(claim)).with_for_update()).one_or_none() is None:
                return False
            for kind, data in events:
                self._add_event(connection, claim.record.id, kind, data)
        return True

    def finish(
        self,
        claim: Claim,
        state: Literal["succeeded", "failed", "cancelled"],
        *,
        problem: Mapping[str, str] | None = None,
        measurement: NewMeasurement | None = None,
    ) -> bool:
        """End a probe under its lease, with what it found; False where the lease was lost and nothing was written."""
        with self._database.write() as connection:
            held = connection.execute(select(probe.c.id).where(*_held_by(claim)).with_for_update()).one_or_none()
            if held is None:
                return False
            data: dict[str, Any] = dict(problem or {})
            if measurement is not None:
                measurement.insert(connection, self._database, probe_id=claim.record.id, token_id=claim.record.token_id)
                data = {"measurement": measurement.id, **measurement.summary}
            self._end(
                connection,
                claim.record.id,
                state,
                data,
                problem=problem,
                measurement_id=measurement.id if measurement else None,
            )
        return True

    def give_back(self, claim: Claim) -> bool:
        """Put a probe back into the queue, its attempt not counted: its runner is told to stop."""
        with self._database.write() as connection:
            row = connection.execute(
                update(probe)
                .where(*_held_by(claim))
                .values(state="queued", owner=None, slot=None, lease_until=None, attempts=probe.c.attempts - 1)
                .returning(probe.c.cancel_requested)
            ).one_or_none()
            if row is None:
                return False
            if row.cancel_requested:
                self._end(connection, claim.record.id, "cancelled", {})
            else:
                self._add_event(connection, claim.record.id, "requeued", {"reason": "the runner is shutting down"})
        return True

    def lose(self, claim: Claim, problem: Mapping[str, str]) -> bool:
        """Say that a run died of no fault that is known: it is run anew, or given up after the last attempt."""
        with self._database.write() as connection:
            row = connection.execute(select(probe).where(*_held_by(claim)).with_for_update()).one_or_none()
            if row is None:
                return False
            self._requeue(connection, row, problem)
        return True

    def recover(self) -> int:
        """Take back every probe whose lease ran out; returns how many."""
        overdue = (probe.c.state == "running", probe.c.lease_until < self._database.now())
        with self._database.read() as connection:
            if connection.execute(select(probe.c.id).where(*overdue).limit(1)).one_or_none() is None:
                return 0
        with self._database.write() as connection:
            rows = connection.execute(select(probe).where(*overdue).with_for_update(skip_locked=True)).all()
            for row in rows:
                problem = {
                    "code": "runner-lost",
                    "detail": f"its runner gave no sign of life any more, in each of {row.attempts} attempts",
                }
                self._requeue(connection, row, problem)
        return len(rows)

    def tidy(self, *, keep_events_seconds: float) -> None:
        """Forget what has served its time: old events and keys."""
        now = self._database.now()
        ended = select(probe.c.id).where(probe.c.ended_at < now - keep_events_seconds)
        with self._database.write() as connection:
            connection.execute(delete(event).where(event.c.probe_id.in_(ended)))
            connection.execute(delete(idempotency).where(idempotency.c.created_at < now - _IDEMPOTENCY_SECONDS))

    # ---- inside a transaction ---------------------------------------------------------------------------------------

    def _one_at_a_time(self, connection: Connection) -> None:
        """Let one submission in at a time, so that neither the bounds nor a key are passed by two at once."""
        connection.execute(select(generation).with_for_update())

    def _requeue(self, connection: Connection, row: Row[Any], problem: Mapping[str, str]) -> None:
        if row.cancel_requested:
            self._end(connection, row.id, "cancelled", {})
        elif row.attempts >= self._max_attempts:
            self._end(connection, row.id, "failed", problem, problem=problem)
        else:
            connection.execute(
                update(probe)
                .where(probe.c.id == row.id)
                .values(state="queued", owner=None, slot=None, lease_until=None)
            )
            self._add_event(connection, row.id, "requeued", {"reason": problem["code"]})

    def _end(
        self,
        connection: Connection,
        probe_id: str,
        state: State,
        data: Mapping[str, Any],
        *,
        problem: Mapping[str, str] | None = None,
        measurement_id: str | None = None,
    ) -> None:
        connection.execute(
            update(probe)
            .where(probe.c.id == probe_id, probe.c.state.not_in(ENDED))
            .values(
                state=state,
                ended_at=self._database.now(),
                owner=None,
                slot=None,
                lease_until=None,
                problem_json=None if problem is None else json.dumps(dict(problem)),
                measurement_id=measurement_id,
            )
        )
        self._add_event(connection, probe_id, state, data)

    def _add_event(self, connection: Connection, probe_id: str, kind: str, data: Mapping[str, Any]) -> None:
        last = select(func.coalesce(func.max(event.c.number), 0) + 1).where(event.c.probe_id == probe_id)
        connection.execute(
            insert(event).values(
                probe_id=probe_id,
                number=last.scalar_subquery(),
                at=self._database.now(),
                kind=kind,
                data_json=json.dumps(dict(data)),
            )
        )

    def _check_room(self, connection: Connection, token_id: str | None, limits: Limits) -> None:
        waiting = connection.execute(select(func.count()).where(probe.c.state == "queued")).scalar_one()
        if waiting >= limits.queued:
            raise QueueFullError(waiting, limits.queued, of_token=False)
        if token_id is None:
            return
        mine = select(func.count()).where(
            probe.c.token_id == token_id, or_(probe.c.state == "queued", probe.c.state == "running")
        )
        of_token = connection.execute(mine).scalar_one()
        if of_token >= limits.per_token:
            raise QueueFullError(of_token, limits.per_token, of_token=True)

    def _find_key(self, connection: Connection, principal: str, key: str, digest: str) -> Submission | None:
        found = connection.execute(
            select(idempotency).where(
                idempotency.c.principal == principal,
                idempotency.c.key == key,
                idempotency.c.created_at >= self._database.now() - _IDEMPOTENCY_SECONDS,
            )
        ).one_or_none()
        if found is None:
            return None
        if found.request_hash != digest:
            raise ReusedKeyError
        row = connection.execute(select(probe).where(probe.c.id == found.probe_id)).one_or_none()
        return Submission(
            record=None if row is None else _record(row), measurement_id=found.measurement_id, replayed=True
        )

    def _keep_key(
        self,
        connection: Connection,
        principal: str,
        key: str | None,
        digest: str,
        *,
        probe_id: str | None = None,
        measurement_id: str | None = None,
    ) -> None:
        if key is None:
            return
        connection.execute(delete(idempotency).where(idempotency.c.principal == principal, idempotency.c.key == key))
        connection.execute(
            insert(idempotency).values(
                principal=principal,
                key=key,
                request_hash=digest,
                probe_id=probe_id,
                measurement_id=measurement_id,
                created_at=self._database.now(),
            )
        )


def _held_by(claim: Claim) -> tuple[Any, ...]:
    return (
        probe.c.id == claim.record.id,
        probe.c.state == "running",
        probe.c.owner == claim.owner,
        probe.c.fence == claim.fence,
    )


def _record(row: Row[Any]) -> ProbeRecord:
    return ProbeRecord(
        id=row.id,
        state=row.state,
        order=Order(workload=row.workload, gpu=row.gpu, basis=row.basis, options=json.loads(row.options_json)),
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        attempts=row.attempts,
        cancel_requested=row.cancel_requested,
        token_id=row.token_id,
        measurement_id=row.measurement_id,
        problem=None if row.problem_json is None else json.loads(row.problem_json),
    )
