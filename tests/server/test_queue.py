"""The queue, on SQLite and on PostgreSQL: leases, fences, ends, bounds, keys, and the order of events."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from service_fakes import make_report
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError

from autobatch.store import Database, MeasurementStore, NewMeasurement
from autobatch_server.database import open_database
from autobatch_server.queue import ENDED, Claim, Limits, Order, ProbeQueue, QueueFullError, ReusedKeyError, Slot
from autobatch_server.tables import event, idempotency, probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch_server.queue import Submission

ORDER = Order(workload="gpt2", gpu="L4", basis="emulated", options={"target": 256})
SLOT = Slot(name="host/emulated-0", basis="emulated", gpu=None)
LIMITS = Limits(queued=100, per_token=50)
_TOKEN, _OTHER_TOKEN = "tok_1", "tok_2"  # ids, no secrets
PROBLEM = {"code": "runner-lost", "detail": "gone"}


def submit(queue: ProbeQueue, order: Order = ORDER, **values: Any) -> Submission:
    """Submit a probe without a key."""
    given = {"principal": "anyone", "token_id": None, "limits": LIMITS, "key": None, "request": b"{}"}
    return queue.submit(order, **{**given, **values})


def submit_id(queue: ProbeQueue, order: Order = ORDER, **values: Any) -> str:
    """Submit a probe; its id."""
    record = submit(queue, order, **values).record
    assert record is not None
    return record.id


def claimed(queue: ProbeQueue, slot: Slot = SLOT, owner: str = "one") -> Claim:
    """Claim what must be there."""
    claim = queue.claim(slot, owner)
    assert claim is not None
    return claim


def measurement() -> NewMeasurement:
    """What a run found."""
    return NewMeasurement.of(make_report(gpu="L4"), workload="gpt2", gpu="L4", source="probe")


def kinds(queue: ProbeQueue, probe_id: str) -> list[str]:
    """The kinds of a probe's events, in order; their numbers are 1, 2, …."""
    events = queue.events_after(probe_id, 0)
    assert [found.number for found in events] == list(range(1, len(events) + 1))
    assert [found.at for found in events] == sorted(found.at for found in events)
    return [found.kind for found in events]


def lapse(database: Database, claim: Claim) -> None:
    """Let a lease run out, without the waiting."""
    with database.write() as connection:
        connection.execute(update(probe).where(probe.c.id == claim.record.id).values(lease_until=database.now() - 1.0))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty database of each kind."""
    with open_database(database_url) as opened:
        yield opened


@pytest.fixture
def queue(database: Database) -> ProbeQueue:
    """A queue whose leases outlast the test."""
    return ProbeQueue(database, lease_seconds=60, max_attempts=3)


def at_once(number: int, act: Callable[[int], Any]) -> list[Any]:
    """Do something from several threads at one moment; what each returned or raised."""

    def guarded(index: int) -> Any:
        try:
            return act(index)
        except (QueueFullError, ReusedKeyError) as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(guarded, range(number)))


# ---- the course of a probe ------------------------------------------------------------------------------------------


def test_a_probe_is_claimed_and_ends_with_a_measurement(database: Database, queue: ProbeQueue) -> None:
    """Queued, running under fence 1 and attempt 1, succeeded with its measurement; each step is an event."""
    probe_id = submit_id(queue, token_id=_TOKEN)
    claim = claimed(queue)
    assert (claim.record.id, claim.record.state, claim.fence, claim.record.attempts) == (probe_id, "running", 1, 1)
    assert queue.renew(claim) == "held"
    assert queue.add_events(claim, [("trial_started", {"window": [1]}), ("trial_ended", {})])
    found = measurement()
    assert queue.finish(claim, "succeeded", measurement=found)
    record = queue.get(probe_id)
    assert record is not None
    assert (record.state, record.measurement_id, record.order) == ("succeeded", found.id, ORDER)
    assert record.created_at <= (record.started_at or 0) <= (record.ended_at or 0)
    stored = MeasurementStore(database).get(found.id)
    assert stored is not None
    assert (stored.probe_id, stored.report.max_micro_batch_size) == (probe_id, 37)
    assert kinds(queue, probe_id) == ["queued", "started", "trial_started", "trial_ended", "succeeded"]
    assert queue.last_event(probe_id) == 5
    assert queue.count() == {"queued": 0, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 0}


def test_the_oldest_that_the_slot_serves_is_claimed_first(queue: ProbeQueue) -> None:
    """A real GPU serves its own card alone, an emulated slot any; order is by age."""
    measured = dataclasses.replace(ORDER, basis="measured")
    ids = []
    for order in (dataclasses.replace(measured, gpu="T4"), ORDER, measured, measured):
        ids.append(submit_id(queue, order))
        time.sleep(0.002)  # ids sort by the millisecond
    real = Slot(name="host/GPU-1", basis="measured", gpu="L4")
    first = claimed(queue, real)
    assert first.record.id == ids[2]
    assert queue.claim(real, "one") is None, "the slot is taken"
    assert queue.finish(first, "failed", problem=PROBLEM)
    assert claimed(queue, real).record.id == ids[3]
    assert claimed(queue).record.id == ids[1]
    assert [record.id for record in queue.list_probes(states=["queued"])] == [ids[0]]
    assert [record.id for record in queue.list_probes(limit=2)] == [ids[3], ids[2]]
    assert [record.id for record in queue.list_probes(before=ids[1])] == [ids[0]]


@pytest.mark.parametrize("end", ["finish", "lose", "give_back", "lapse"])
def test_a_cancelled_probe_is_not_run_again(database: Database, queue: ProbeQueue, end: str) -> None:
    """However the run ends after the wish: the probe is cancelled, and ends once."""
    probe_id = submit_id(queue)
    claim = claimed(queue)
    for _ in range(2):
        record = queue.cancel(probe_id)
        assert record is not None
        assert (record.state, record.cancel_requested) == ("running", True)
    assert queue.renew(claim) == "cancel"
    if end == "finish":
        assert queue.finish(claim, "cancelled")
    elif end == "lose":
        assert queue.lose(claim, PROBLEM)
    elif end == "give_back":
        assert queue.give_back(claim)
    else:
        lapse(database, claim)
        assert queue.recover() == 1
    assert kinds(queue, probe_id) == ["queued", "started", "cancel_requested", "cancelled"]
    again = queue.cancel(probe_id)
    assert again is not None
    assert again.state == "cancelled"
    assert kinds(queue, probe_id)[-1] == "cancelled"
    assert queue.claim(SLOT, "one") is None


def test_a_queued_probe_is_cancelled_at_once_and_an_unknown_one_is_none(queue: ProbeQueue) -> None:
    """Nobody has to look at it first."""
    probe_id = submit_id(queue)
    record = queue.cancel(probe_id)
    assert record is not None
    assert record.state == "cancelled"
    assert record.ended_at is not None
    assert queue.cancel("prb_0") is None
    assert queue.get("prb_0") is None


def test_a_run_that_dies_is_tried_again_until_the_last_attempt(database: Database, queue: ProbeQueue) -> None:
    """Lost runs and lapsed leases count alike; the third ends it, with a problem; a shutdown does not count."""
    probe_id = submit_id(queue)
    assert queue.give_back(claimed(queue))
    assert queue.lose(claimed(queue), PROBLEM)
    lapse(database, claimed(queue))
    assert queue.recover() == 1
    assert queue.recover() == 0
    last = claimed(queue)
    assert (last.fence, last.record.attempts) == (4, 3)
    lapse(database, last)
    assert queue.recover() == 1
    record = queue.get(probe_id)
    assert record is not None
    assert record.state == "failed"
    assert record.problem is not None
    assert record.problem["code"] == "runner-lost"
    assert "3 attempts" in record.problem["detail"]
    assert kinds(queue, probe_id) == ["queued", *["started", "requeued"] * 3, "started", "failed"]


# ---- fences ---------------------------------------------------------------------------------------------------------


def test_a_zombie_is_refused_whatever_it_sends(database: Database, queue: ProbeQueue) -> None:
    """After its lease was given to another, also to the same owner, nothing that it sends leaves a trace."""
    probe_id = submit_id(queue)
    zombie = claimed(queue)
    lapse(database, zombie)
    assert queue.recover() == 1
    for successor in (None, "another", "one"):  # between two leases, under another's, under its own later one
        if successor is not None:
            current = claimed(queue, owner=successor)
        before = kinds(queue, probe_id)
        assert queue.renew(zombie) == "lost"
        assert not queue.add_events(zombie, [("trial_ended", {})])
        assert not queue.finish(zombie, "succeeded", measurement=measurement())
        assert not queue.give_back(zombie)
        assert not queue.lose(zombie, PROBLEM)
        assert kinds(queue, probe_id) == before
        if successor is not None:
            assert queue.renew(current) == "held"
            assert queue.give_back(current)
    assert queue.finish(claimed(queue), "succeeded", measurement=(found := measurement()))
    assert not queue.finish(zombie, "failed", problem=PROBLEM)
    assert [kept.id for kept in MeasurementStore(database).list_newest()] == [found.id]
    assert kinds(queue, probe_id)[-1] == "succeeded"


def test_a_lapsed_lease_that_nobody_took_is_still_held(database: Database, queue: ProbeQueue) -> None:
    """A runner that could not renew in time goes on, where no other was quicker."""
    submit(queue)
    claim = claimed(queue)
    lapse(database, claim)
    assert queue.renew(claim) == "held"
    assert queue.recover() == 0
    assert queue.finish(claim, "succeeded", measurement=measurement())


def test_the_database_itself_allows_one_running_probe_for_each_slot(database_url: str) -> None:
    """Many runners that claim for one GPU at a moment, each over connections of its own: one of them has it."""
    with open_database(database_url) as first, open_database(database_url) as second:
        queues = [ProbeQueue(opened, lease_seconds=60, max_attempts=3) for opened in (first, second)]
        for _ in range(8):
            submit(queues[0])
        for _ in range(3):
            claims = at_once(6, lambda index: queues[index % 2].claim(SLOT, f"owner-{index}"))
            held = [claim for claim in claims if claim is not None]
            assert len(held) == 1
            assert queues[0].count()["running"] == 1
            assert queues[1].finish(held[0], "failed", problem=PROBLEM)
        # Where even the look into the queue is passed over, the unique index stands.
        claimed(queues[0])
        statement = update(probe).where(probe.c.state == "queued").values(state="running", slot=SLOT.name)
        with pytest.raises(IntegrityError), first.write() as connection:
            connection.execute(statement)


def test_many_slots_share_the_queue_without_taking_one_probe_twice(queue: ProbeQueue) -> None:
    """Eight slots empty a queue of 24 together: each probe is claimed once."""
    ids = {submit_id(queue) for _ in range(24)}

    def work(index: int) -> list[str]:
        mine = []
        slot = dataclasses.replace(SLOT, name=f"host/emulated-{index}")
        until = time.monotonic() + 20
        while time.monotonic() < until and queue.count()["queued"]:
            if (claim := queue.claim(slot, f"owner-{index}")) is not None:
                assert queue.finish(claim, "failed", problem=PROBLEM)
                mine.append(claim.record.id)
        return mine

    done = [probe_id for mine in at_once(8, work) for probe_id in mine]
    assert len(done) == 24
    assert set(done) == ids


# ---- bounds, keys, events -------------------------------------------------------------------------------------------


def test_the_bounds_hold_when_many_submit_at_once(queue: ProbeQueue) -> None:
    """Of twelve at a moment five get in; of one token's twelve, three, whether they wait or run."""
    results = at_once(12, lambda _: submit(queue, limits=Limits(queued=5, per_token=50)))
    refused = [result for result in results if isinstance(result, QueueFullError)]
    assert len(refused) == 7
    assert all((error.waiting, error.limit, error.of_token) == (5, 5, False) for error in refused)
    assert queue.count()["queued"] == 5
    claimed(queue)
    mine = at_once(12, lambda _: submit(queue, token_id=_TOKEN, limits=Limits(queued=100, per_token=3)))
    assert len([result for result in mine if isinstance(result, QueueFullError) and result.of_token]) == 9
    submit(queue, token_id=_OTHER_TOKEN, limits=Limits(queued=100, per_token=3))


def test_one_key_is_one_probe_also_when_sent_many_times_at_once(queue: ProbeQueue) -> None:
    """The first makes it, the others are replays; another body is refused, another asker's key is another key."""
    results = at_once(8, lambda _: submit(queue, key="k", request=b"a"))
    assert len({result.record.id for result in results}) == 1
    assert sorted(result.replayed for result in results) == [False] + [True] * 7
    assert queue.count()["queued"] == 1
    with pytest.raises(ReusedKeyError):
        submit(queue, key="k", request=b"b")
    assert not submit(queue, key="k", request=b"b", principal="another").replayed
    found = queue.find_replay(principal="anyone", key="k", request=b"a")
    assert found is not None
    assert found.record == results[0].record
    assert queue.find_replay(principal="anyone", key="unknown", request=b"a") is None


def test_a_replay_is_answered_also_where_the_queue_is_full(queue: ProbeQueue) -> None:
    """What was accepted once stays accepted."""
    first = submit_id(queue, key="k", limits=Limits(queued=1, per_token=1))
    assert submit_id(queue, key="k", limits=Limits(queued=1, per_token=1)) == first
    with pytest.raises(QueueFullError):
        submit(queue, limits=Limits(queued=1, per_token=1))


def test_one_key_is_one_measurement_when_answers_race_with_submissions(queue: ProbeQueue) -> None:
    """Whoever is first decides what the key stands for; nobody fails."""

    def ask(index: int) -> Submission:
        if index % 2:
            return submit(queue, key="k")
        return queue.answer_with("mea_1", principal="anyone", key="k", request=b"{}")

    results = at_once(8, ask)
    assert len({(result.record and result.record.id, result.measurement_id) for result in results}) == 1
    assert sum(not result.replayed for result in results) == 1
    unkept = queue.answer_with("mea_2", principal="anyone", key=None, request=b"{}")
    assert (unkept.measurement_id, unkept.replayed) == ("mea_2", False)


def test_events_of_many_writers_have_one_order(queue: ProbeQueue) -> None:
    """Writers at once under one lease, and a cancel between them: the numbers have neither gaps nor doubles."""
    probe_id = submit_id(queue)
    claim = claimed(queue)

    def write(index: int) -> bool:
        if index == 3:
            return queue.cancel(probe_id) is not None
        return queue.add_events(claim, [("trial_started", {"by": index}), ("trial_ended", {"by": index})])

    assert all(at_once(8, write))
    found = kinds(queue, probe_id)
    assert len(found) == 2 + 14 + 1
    ordered = [entry.data["by"] for entry in queue.events_after(probe_id, 2) if "by" in entry.data]
    assert ordered[::2] == ordered[1::2], "one writer's two events stand together"
    assert [entry.number for entry in queue.events_after(probe_id, 5, limit=3)] == [6, 7, 8]


def test_what_has_served_its_time_is_forgotten_and_nothing_else(database: Database, queue: ProbeQueue) -> None:
    """Events of probes that ended long ago and keys of yesterday go; probes, and what is under way, stay."""
    old, new, running = (submit_id(queue, key=key) for key in ("old", "new", "running"))
    with database.write() as connection:
        connection.execute(update(probe).where(probe.c.id == old).values(state="failed", ended_at=database.now() - 100))
        connection.execute(update(probe).where(probe.c.id == new).values(state="failed", ended_at=database.now()))
        connection.execute(
            update(idempotency).where(idempotency.c.key == "old").values(created_at=database.now() - 90000)
        )
    queue.tidy(keep_events_seconds=50)
    assert [queue.last_event(probe_id) for probe_id in (old, new, running)] == [0, 1, 1]
    assert queue.get(old) is not None
    with database.read() as connection:
        assert sorted(connection.execute(select(idempotency.c.key)).scalars()) == ["new", "running"]
    # A key that has run out stands for a new probe.
    assert not submit(queue, key="old").replayed


# ---- any order of everything ----------------------------------------------------------------------------------------


class QueueMachine(RuleBasedStateMachine):
    """What any order of calls must keep: one end, one measurement for a success, the newest fence alone may write."""

    probes = Bundle("probes")
    claims = Bundle("claims")

    @initialize()
    def open(self) -> None:
        """Begin on an empty database."""
        self.folder = tempfile.TemporaryDirectory()
        self.database = open_database(f"sqlite:///{Path(self.folder.name) / 's.sqlite3'}")
        self.queue = ProbeQueue(self.database, lease_seconds=60, max_attempts=3)
        self.current: dict[str, Claim] = {}
        self.ended: dict[str, str] = {}

    def teardown(self) -> None:
        """Leave nothing."""
        if hasattr(self, "folder"):
            self.database.close()
            self.folder.cleanup()

    @rule(target=probes)
    def submit(self) -> str:
        return submit_id(self.queue)

    @rule(target=claims, slot=st.integers(0, 1), owner=st.sampled_from("ab"))
    def claim(self, slot: int, owner: str) -> Claim | None:
        claim = self.queue.claim(dataclasses.replace(SLOT, name=f"slot-{slot}"), owner)
        if claim is not None:
            assert claim.record.id not in self.current
            assert all(held.slot != claim.slot for held in self.current.values())
            self.current[claim.record.id] = claim
        return claim

    def _holds(self, claim: Claim) -> bool:
        return self.current.get(claim.record.id) is claim

    def _let_go(self, claim: Claim) -> None:
        del self.current[claim.record.id]

    @rule(claim=claims, state=st.sampled_from(["succeeded", "failed", "cancelled"]))
    def finish(self, claim: Claim | None, state: Any) -> None:
        if claim is None:
            return
        found = measurement() if state == "succeeded" else None
        problem = PROBLEM if state == "failed" else None
        written = self.queue.finish(claim, state, measurement=found, problem=problem)
        assert written == self._holds(claim)
        if written:
            self._let_go(claim)
            self.ended[claim.record.id] = state

    @rule(claim=claims)
    def renew(self, claim: Claim | None) -> None:
        if claim is not None:
            assert (self.queue.renew(claim) != "lost") == self._holds(claim)

    @rule(claim=claims)
    def tell(self, claim: Claim | None) -> None:
        if claim is not None:
            assert self.queue.add_events(claim, [("trial_started", {})]) == self._holds(claim)

    @rule(claim=claims, lost=st.booleans())
    def let_go(self, claim: Claim | None, lost: bool) -> None:
        if claim is None:
            return
        written = self.queue.lose(claim, PROBLEM) if lost else self.queue.give_back(claim)
        assert written == self._holds(claim)
        if written:
            self._let_go(claim)
            self._note_end(claim.record.id)

    @rule(claim=claims)
    def recover(self, claim: Claim | None) -> None:
        if claim is None or not self._holds(claim):
            assert self.queue.recover() == 0
            return
        lapse(self.database, claim)
        assert self.queue.recover() == 1
        self._let_go(claim)
        self._note_end(claim.record.id)

    def _note_end(self, probe_id: str) -> None:
        record = self.queue.get(probe_id)
        assert record is not None
        if record.state in ENDED:
            self.ended[probe_id] = record.state

    @rule(probe_id=probes)
    def cancel(self, probe_id: str) -> None:
        record = self.queue.cancel(probe_id)
        assert record is not None
        if probe_id not in self.ended and probe_id not in self.current:
            self.ended[probe_id] = "cancelled"
        assert record.state == self.ended.get(probe_id, "running")

    @invariant()
    def ends_are_final_and_single(self) -> None:
        if not hasattr(self, "queue"):
            return
        for probe_id, state in self.ended.items():
            record = self.queue.get(probe_id)
            assert record is not None
            assert record.state == state
            assert [kind for kind in kinds(self.queue, probe_id) if kind in ENDED] == [state]
        with self.database.read() as connection:
            running = connection.execute(select(func.count()).where(probe.c.state == "running")).scalar_one()
            ends = connection.execute(select(func.count()).where(event.c.kind.in_(ENDED))).scalar_one()
        assert running == len(self.current)
        assert ends == len(self.ended)
        succeeded = [probe_id for probe_id, state in self.ended.items() if state == "succeeded"]
        kept = [kept.probe_id for kept in MeasurementStore(self.database).list_newest(limit=1000)]
        assert sorted(map(str, kept)) == sorted(succeeded)


TestAnyOrder = QueueMachine.TestCase
TestAnyOrder.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
