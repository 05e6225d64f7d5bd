"""The service on a Ray cluster of three nodes with different cards, all on this machine, the cards emulated."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from service_fakes import RunningService, make_settings, running_service

from autobatch import UnavailableError
from autobatch_server.execution import ChildExecutor, end_orphans
from autobatch_server.ray_engine import CARD_LABEL, RayEngine
from autobatch_server.serving import serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("libraries"), pytest.mark.timeout(300)]
pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]' in autobatch's own folder")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without a card, an L4 by the operator's label, a T4 by Ray's resource, and a node whose card nobody can tell."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1, num_gpus=1, labels={CARD_LABEL: "L4"})
        made.add_node(num_cpus=1, num_gpus=1, resources={"accelerator_type:T4": 1})
        made.add_node(num_cpus=1, num_gpus=1, resources={"accelerator_type:A100": 1})
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def service(cluster: Any, tmp_path: Path) -> Iterator[RunningService]:
    settings = make_settings(tmp_path, ray_address=cluster.address, ray_emulate=True, lease=2.0, emulated_slots=0)
    with running_service(settings) as running:
        yield running


def submit(service: RunningService, gpu: str, **more: Any) -> Any:
    body = {
        "workload": "gpt2",
        "parameters": {"layers": 1, "seq_len": 64},
        "target": 64,
        "gpu": gpu,
        "force": True,
        **more,
    }
    return service.client.post("/v1/probes", json=body)


def wait_for(service: RunningService, probe_id: str, *states: str, seconds: float = 120.0) -> Any:
    until = time.monotonic() + seconds
    while (probe := service.client.get(f"/v1/probes/{probe_id}").json())["state"] not in states:
        assert time.monotonic() < until, probe
        time.sleep(0.2)
    return probe


def slot_of(service: RunningService, probe_id: str) -> str:
    """Where a probe was started last."""
    events = service.services.queue.events_after(probe_id, 0)
    return str([event.data["slot"] for event in events if event.kind == "started"][-1])


def test_each_probe_runs_on_a_node_with_its_card(service: RunningService, cluster: Any) -> None:
    """Two kinds at once, each in its place; a card that no node has is refused at once rather than waited for."""
    probes = {gpu: submit(service, gpu).json()["id"] for gpu in ("L4", "T4")}
    for probe_id in probes.values():
        assert wait_for(service, probe_id, "succeeded", "failed")["state"] == "succeeded"
    places = {gpu: slot_of(service, probe_id) for gpu, probe_id in probes.items()}
    assert len(set(places.values())) == 2
    assert all(place.startswith("ray/") for place in places.values())
    for gpu, probe_id in probes.items():
        measurement = service.client.get(f"/v1/probes/{probe_id}").json()["measurement"]
        report = service.client.get(f"/v1/measurements/{measurement}").json()["report"]
        assert report["basis"] == "emulated"
        assert gpu in report["device"]["name"]
    refused = submit(service, "A100-SXM4-40GB")
    assert (refused.status_code, refused.json()["code"]) == (503, "no-matching-runner")
    del cluster


def test_a_killed_worker_costs_an_attempt(service: RunningService) -> None:
    """Ray's worker process dies, and the child with it: the probe runs again and ends well."""
    probe_id = submit(service, "L4", target=512, parameters={"layers": 4, "seq_len": 256}).json()["id"]
    wait_for(service, probe_id, "running")
    child = wait_for_child(probe_id)
    worker = child.parent()
    assert worker is not None
    worker.kill()
    probe = wait_for(service, probe_id, "succeeded", "failed")
    assert (probe["state"], probe["attempts"]) == ("succeeded", 2)
    assert not child.is_running()


def test_a_lost_node_costs_an_attempt_and_its_card(service: RunningService, cluster: Any) -> None:
    """Of two nodes with an RTX-3060 the one that runs the probe is lost: the other takes over, and goes on alone."""
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1, labels={CARD_LABEL: "RTX-3060-12GB"}) for _ in range(2)]
    cluster.wait_for_nodes()
    until = time.monotonic() + 30
    while (answer := submit(service, "RTX-3060-12GB", target=512, parameters={"layers": 4})).status_code == 503:
        assert time.monotonic() < until, answer.text
        time.sleep(0.5)
    probe_id = answer.json()["id"]
    wait_for(service, probe_id, "running")
    wait_for_child(probe_id)
    first = slot_of(service, probe_id)
    by_name = {node.node_id[:16]: node for node in nodes}
    lost = by_name.pop(first.split("/")[1])
    cluster.remove_node(lost, allow_graceful=False)
    probe = wait_for(service, probe_id, "succeeded", "failed")
    assert probe["state"] == "succeeded"
    assert slot_of(service, probe_id).split("/")[1] in by_name
    for node in by_name.values():
        cluster.remove_node(node)


def test_no_cluster_and_a_cluster_that_is_not_there_are_told() -> None:
    """Before anything is served."""
    engine = RayEngine("127.0.0.1:1", emulate=True, memory_limit_bytes=2**30)
    with pytest.raises(UnavailableError, match=r"no Ray cluster at 127\.0\.0\.1:1: "), engine:
        pass


def test_a_service_without_its_cluster_ends_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It does not say that it serves."""
    settings = make_settings(tmp_path, ray_address="127.0.0.1:1", port=0)
    with pytest.raises(UnavailableError, match=r"no Ray cluster at 127\.0\.0\.1:1: "):
        serve(settings)
    assert capfd.readouterr().err == ""


def test_a_node_without_a_gpu_in_its_resources_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Labelled with a card, it would stand there unused and nobody would know why."""
    engine = RayEngine("auto", emulate=True, memory_limit_bytes=2**30)
    node = {"NodeID": "0123456789abcdef0", "Labels": {CARD_LABEL: "L4"}, "Resources": {"CPU": 1}}
    assert engine._card_of(node) is engine._card_of(node) is None
    assert [record.getMessage() for record in caplog.records] == [
        "Ray node 0123456789abcdef is not used: it is said to have L4, and Ray counts no GPU on it: start it with --num-gpus=N"
    ]


def test_a_probe_sees_nothing_of_the_clusters_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's token is in the node's environment, and none of a training job's business."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    executor = ChildExecutor(memory_limit_bytes=2**30)
    assert "RAY_AUTH_TOKEN" not in executor.environment(_task())


def _task() -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(environment={}, claim=SimpleNamespace(record=SimpleNamespace(id="prb_x"), fence=1))


def wait_for_child(probe_id: str) -> psutil.Process:
    """The child process of a probe, wherever Ray started it."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for process in psutil.process_iter():
            try:
                mark = process.environ().get("AUTOBATCH_SERVER_PROBE", "")
                if mark.startswith(probe_id) and "autobatch_server.child" in process.cmdline():
                    return process
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise AssertionError("no child was started")


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left() -> Iterator[None]:
    yield
    end_orphans()
