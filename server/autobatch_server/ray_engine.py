"""Ray as what runs probes: on a node of the cluster that has the card, one probe for each of its GPUs.

Ray only executes. What is queued, who holds it and what it found stand in the service's own database, so that a lost worker, a
lost node and a lost cluster cost no more than an attempt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from autobatch import UnavailableError, UsageError, find_card
from autobatch_server.execution import ChildExecution, ChildExecutor, ProbeTask, end_orphans
from autobatch_server.queue import Slot

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from autobatch_server.execution import Execution

__all__ = ["CARD_LABEL", "RayEngine"]

_LOG = logging.getLogger(__name__)

CARD_LABEL = "autobatch-gpu"
"""A node's label that names its card as the catalogue does, as in `ray start --labels=autobatch-gpu=A100-SXM4-40GB`."""
# What Ray itself says of a node's card: a label since 2.45, and a resource.
_TYPE_LABEL = "ray.io/accelerator-type"
_TYPE_RESOURCE = "accelerator_type:"
_LONG_POLL_SECONDS = 1.0
_END_SECONDS = 15.0
_KNOCK_SECONDS = 10.0
# A node that is gone is still listed for a moment; it is not used again until it was seen without it.
_SHUNNED_SECONDS = 30.0


class RayEngine:
    """A connection to a Ray cluster: its places for probes, and what starts runs there. A context manager."""

    def __init__(
        self, address: str, *, emulate: bool, memory_limit_bytes: int, environment_names: tuple[str, ...] = ()
    ) -> None:
        """Prepare it.

        Args:
            address: the cluster's, as `ray.init` takes it; `auto` for the one on this machine.
            emulate: whether nodes emulate the card that they are said to have.
            memory_limit_bytes: host memory that a probe's processes may use together.
            environment_names: variables of the node that training jobs see besides the usual ones.
        """
        self._address, self._emulate = address, emulate
        self._executor = ChildExecutor(memory_limit_bytes=memory_limit_bytes, environment_names=environment_names)
        self._nodes: dict[str, _Place] = {}
        self._shunned: dict[str, float] = {}
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        try:
            import ray
        except ImportError:
            raise UnavailableError(
                "ray_address is set, and Ray is not installed: pip install '.[ray]' in autobatch's own folder"
            ) from None
        try:
            self._knock()
            with _own_signals():
                ray.init(address=self._address, namespace="autobatch", configure_logging=False, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnavailableError(f"no Ray cluster at {self._address}: {reason}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of the cluster; what still runs there for this process is ended by Ray."""
        import ray

        ray.shutdown()

    def _knock(self) -> None:
        """See that something listens there: Ray itself would try for minutes.

        Raises:
            OSError: nothing does.
        """
        host, colon, port = self._address.rpartition(":")
        if colon and port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()

    def slots(self) -> Sequence[Slot]:
        """The places where probes can run now: one for each GPU of each node that lives, under names that last."""
        import ray

        places: dict[str, _Place] = {}
        for node in ray.nodes():
            if node["Alive"] and (card := self._card_of(node)) is not None:
                for index in range(int(node["Resources"].get("GPU", 0))):
                    name = f"ray/{node['NodeID'][:16]}/{index}"
                    slot = Slot(name=name, basis="emulated" if self._emulate else "measured", gpu=card)
                    places[name] = _Place(slot=slot, node_id=node["NodeID"])
        with self._lock:
            now = time.monotonic()
            self._shunned = {node: until for node, until in self._shunned.items() if until > now}
            self._nodes = {name: place for name, place in places.items() if place.node_id not in self._shunned}
            return [place.slot for place in self._nodes.values()]

    def start(self, task: ProbeTask) -> Execution:
        """Prepare a run on the node of the task's slot."""
        with self._lock:
            place = self._nodes.get(task.claim.slot)
        # Which of the node's GPUs it gets is Ray's to say.
        environment = {name: value for name, value in task.environment.items() if name != "CUDA_VISIBLE_DEVICES"}
        return _RayExecution(self, dataclasses.replace(task, environment=environment), self._executor, place)

    def shun(self, node_id: str) -> None:
        """Leave a node alone for a while, since it is gone."""
        with self._lock:
            self._shunned[node_id] = time.monotonic() + _SHUNNED_SECONDS
            self._nodes = {name: place for name, place in self._nodes.items() if place.node_id != node_id}

    def _card_of(self, node: Mapping[str, Any]) -> str | None:
        """The card of a node, by the operator's label, Ray's label or Ray's resource; None where none names one card."""
        labels = node.get("Labels") or {}
        types = [name.removeprefix(_TYPE_RESOURCE) for name in node["Resources"] if name.startswith(_TYPE_RESOURCE)]
        said = labels.get(CARD_LABEL) or labels.get(_TYPE_LABEL) or next(iter(types), None)
        if said is None:
            return None
        if not node["Resources"].get("GPU"):
            self._tell(node, f"it is said to have {said}, and Ray counts no GPU on it: start it with --num-gpus=N")
            return None
        try:
            return find_card(said).name
        except UsageError as error:
            self._tell(node, f"{error}; label it {CARD_LABEL}=NAME")
            return None

    def _tell(self, node: Mapping[str, Any], why: str) -> None:
        """Say once why a node is not used."""
        if node["NodeID"] not in self._told:
            self._told.add(node["NodeID"])
            _LOG.warning("Ray node %s is not used: %s", node["NodeID"][:16], why)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep how this process ends by SIGTERM, for which Ray puts a handler of its own that exits on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A slot, and the node that it is on."""

    slot: Slot
    node_id: str


@dataclass
class _RayExecution:
    """A run on a node: an actor there starts the child, and is asked for its messages."""

    engine: RayEngine
    task: ProbeTask
    executor: ChildExecutor
    place: _Place | None
    _actor: Any = None
    _asked: Any = field(default=None, repr=False)

    def __enter__(self) -> Self:
        if self.place is None:  # the node went between the claim and now
            return self
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe_class: Any = ray.remote(_NodeProbe)
        self._actor = probe_class.options(
            num_gpus=1,
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(self.place.node_id, soft=False),
        ).remote(self.task, self.executor)
        self._asked = self._actor.next_message.remote(_LONG_POLL_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        actor, self._actor = self._actor, None
        if actor is None:
            return
        import ray

        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # it or its node may be gone
            ray.get(actor.end.remote(), timeout=_END_SECONDS)
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(actor, no_restart=True)

    def next_message(self, seconds: float) -> Mapping[str, Any] | None:
        """The next message; that it died, where its worker or its node did; that its place is gone, where it never began."""
        if self.place is None or self._actor is None:
            return {"gone": {}}
        import ray

        ready, _ = ray.wait([self._asked], timeout=seconds)
        if not ready:
            return None
        try:
            message: Mapping[str, Any] | None = ray.get(self._asked)
        except ray.exceptions.ActorUnschedulableError:
            self.engine.shun(self.place.node_id)
            return {"gone": {}}
        except ray.exceptions.RayError as error:
            if not any(node["NodeID"] == self.place.node_id and node["Alive"] for node in ray.nodes()):
                self.engine.shun(self.place.node_id)
            return {"died": {"status": None, "log": str(error)}}
        self._asked = self._actor.next_message.remote(_LONG_POLL_SECONDS)
        return message


class _NodeProbe:
    """One probe on a node, in a process of Ray's: starts the child there, which dies with it."""

    def __init__(self, task: ProbeTask, executor: ChildExecutor) -> None:
        end_orphans()  # what a worker that was killed left on this machine
        self._execution: ChildExecution | None = executor.start(task)
        self._execution.__enter__()

    def next_message(self, seconds: float) -> Mapping[str, Any] | None:
        """The child's next message; None where none came in time."""
        return None if self._execution is None else self._execution.next_message(seconds)

    def end(self) -> None:
        """End the child and all that it started."""
        execution, self._execution = self._execution, None
        if execution is not None:
            execution.__exit__(None, None, None)
