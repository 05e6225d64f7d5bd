"""The webhook for Kubernetes: a Pod leaves it with its plan and with nodes that fit it, and is never held up."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonpatch
import kubernetes_validate
import pytest
from hypothesis import given
from hypothesis import strategies as st
from service_fakes import FakeExecutor, make_report, make_settings, running_service, succeeding

from autobatch.store import NewMeasurement, StoreUnavailableError
from autobatch_server.pods import Pod, PodError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from service_fakes import RunningService

REVIEW = json.loads((Path(__file__).parents[1] / "data/kubernetes/review.json").read_text())
A100, L4 = "NVIDIA-A100-SXM4-40GB", "NVIDIA-L4"
VERSIONS = ("1.30", "1.37")


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """37 fit on an A100, 17 on an L4, nothing on a T4; of others nothing is known."""
    settings = make_settings(tmp_path_factory.mktemp("service"))
    with running_service(settings, executor=FakeExecutor(succeeding)) as running:
        for gpu, largest in (("A100-SXM4-40GB", 37), ("L4", 17), ("T4", None)):
            keep(running, gpu, largest)
        yield running


def keep(service: RunningService, gpu: str, largest: int | None, **values: Any) -> None:
    """Store what a probe of gpt2 on a card would have found."""
    new = NewMeasurement.of(
        make_report(gpu=gpu, largest=largest, **values), workload="gpt2", gpu=gpu, source="reported"
    )
    service.services.measurements.add(new, token_id=None)


def review(
    service: RunningService,
    annotations: Mapping[str, str] | None = None,
    *,
    spec: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    operation: str = "CREATE",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Send the review with some of its Pod changed; returns the answer and the Pod as it then is."""
    asked = copy.deepcopy(REVIEW)
    asked["request"]["operation"] = operation
    pod = asked["request"]["object"]
    pod["metadata"]["annotations"] |= {f"autobatch/{key}": value for key, value in (annotations or {}).items()}
    # Of a job of its own, unless a test says so: Pods of one job are told the same.
    pod["metadata"]["ownerReferences"][0]["uid"] = uuid.uuid4().hex
    pod["metadata"] |= metadata or {}
    pod["spec"] |= spec or {}
    pod["spec"]["containers"][1] |= train or {}
    return send(service, asked)


def send(service: RunningService, asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    answered = service.client.post("/v1/kubernetes/mutate", json=asked)
    assert answered.status_code == 200, answered.text
    form = answered.json()
    assert (form["apiVersion"], form["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response: dict[str, Any] = form["response"]
    assert (response["uid"], response["allowed"]) == (asked["request"]["uid"], True)
    assert ("patch" in response) == (response.get("patchType") == "JSONPatch")
    assert all(len(text) <= 256 for text in response.get("warnings", []))
    pod = asked["request"]["object"]
    if "patch" in response:
        pod = jsonpatch.apply_patch(pod, json.loads(base64.b64decode(response["patch"])))
        for version in VERSIONS:
            kubernetes_validate.validate(without_nulls(pod), version, strict=True)
    return response, pod


def only_noted(response: Mapping[str, Any], pod: Mapping[str, Any]) -> str:
    """Why a Pod that asked goes on without a plan: a warning and a note that say the same, and nothing else changed."""
    operations = json.loads(base64.b64decode(response["patch"]))
    assert [one["path"] for one in operations] == ["/metadata/annotations/autobatch~1answer"]
    note: str = pod["metadata"]["annotations"]["autobatch/answer"]
    assert [f"autobatch: {note.removeprefix('none: ')}"[:256]] == response["warnings"]
    return note


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def environment(pod: Mapping[str, Any], container: int = 1) -> dict[str, str]:
    return {one["name"]: one.get("value") for one in pod["spec"]["containers"][container].get("env", [])}


def products(pod: Mapping[str, Any]) -> list[str]:
    """The cards that the Pod's terms name, one each."""
    node = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    found = []
    for term in node["nodeSelectorTerms"]:
        ours = [one for one in term["matchExpressions"] if one["key"] == "nvidia.com/gpu.product"][-1]
        found += ours["values"]
    return found


def test_a_pod_is_told_the_plan_and_sent_where_it_fits(stocked: RunningService) -> None:
    """The least card that fits gives the plan; the larger one takes it too; the too small and the unknown do not."""
    response, pod = review(stocked)
    told = environment(pod)
    measurement = told.pop("AUTOBATCH_MEASUREMENT")
    assert told == {
        "AUTOBATCH_BASIS": "emulated",
        "AUTOBATCH_TARGET": "256",
        "AUTOBATCH_WORLD_SIZE": "1",
        "AUTOBATCH_EFFECTIVE_BATCH_SIZE": "256",
        "AUTOBATCH_EXACT": "1",
        "AUTOBATCH_ACCUMULATION_STEPS": "16",
        "AUTOBATCH_MICRO_BATCH_SIZE": "16",
        "AUTOBATCH_MICRO_BATCH_SIZES": ",".join(["16"] * 16),
    }
    assert products(pod) == [L4, A100]
    assert "env" not in pod["spec"]["containers"][0]
    assert "env" not in pod["spec"]["initContainers"][0]
    note = pod["metadata"]["annotations"]["autobatch/answer"]
    assert note == f"16 x 16 on L4, A100-SXM4-40GB (emulated, {measurement})"
    assert response["auditAnnotations"] == {"verdict": "fits", "measurement": measurement}
    assert "warnings" not in response
    [term, _] = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    [memory] = [one for one in term["matchExpressions"] if one["key"] == "nvidia.com/gpu.memory"]
    assert memory["operator"] == "Gt"
    assert 22_000 < int(memory["values"][0]) < 23_034  # nvidia-smi shows 23034 MiB on an L4; half of one is no L4


def test_the_order_of_the_pods_own_list_decides(stocked: RunningService) -> None:
    """By any of a card's names; what the preferred one takes does not fit the other, so only the one is left."""
    _, pod = review(stocked, {"gpus": "a100-40gb, L4"})
    assert environment(pod)["AUTOBATCH_MICRO_BATCH_SIZE"] == "32"
    assert products(pod) == [A100]


def test_ranks_are_the_gpus_of_the_pod_unless_it_says_otherwise(stocked: RunningService) -> None:
    """Four cards in a Pod are four ranks; several Pods of a job say how many there are together."""
    four = {"resources": {"limits": {"nvidia.com/gpu": "4"}}}
    _, pod = review(stocked, train=four)
    assert environment(pod)["AUTOBATCH_WORLD_SIZE"] == "4"
    assert environment(pod)["AUTOBATCH_ACCUMULATION_STEPS"] == "4"
    _, pod = review(stocked, {"world-size": "16"}, train=four)
    assert (environment(pod)["AUTOBATCH_WORLD_SIZE"], environment(pod)["AUTOBATCH_MICRO_BATCH_SIZE"]) == ("16", "16")


def test_one_of_several_pods_that_counts_itself_alone_is_warned(stocked: RunningService) -> None:
    """The batch would be the target times the Pods."""
    labels = {"labels": {"batch.kubernetes.io/job-completion-index": "0"}}
    response, _ = review(stocked, metadata=labels)
    assert "its own GPU is taken for all: write autobatch/world-size" in response["warnings"][0]
    assert "warnings" not in review(stocked, {"world-size": "2"}, metadata=labels)[0]


def test_the_pods_own_selection_is_kept_and_narrowed(stocked: RunningService) -> None:
    """Each of its terms is met as before, with a card besides; what it forbids is not chosen."""
    zones = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]} for zone in ("a", "b")]
    preferred = [{"weight": 1, "preference": {"matchExpressions": [{"key": "ssd", "operator": "Exists"}]}}]
    affinity = {
        "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "host"}]},
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [*zones, {}]},
            "preferredDuringSchedulingIgnoredDuringExecution": preferred,
        },
    }
    _, pod = review(stocked, spec={"affinity": affinity})
    new = pod["spec"]["affinity"]
    assert new["podAntiAffinity"] == affinity["podAntiAffinity"]
    assert new["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] == preferred
    terms = new["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    shown = [tuple(one["values"][0] for one in term["matchExpressions"][:2]) for term in terms if term]
    assert shown == [("a", L4), ("a", A100), ("b", L4), ("b", A100)]
    assert terms[-1] == {}  # meets no node, and must not begin to


@pytest.mark.parametrize(
    "spec",
    [
        {"nodeSelector": {"nvidia.com/gpu.product": A100, "disk": "ssd"}},
        *(
            {
                "affinity": {
                    "nodeAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": {
                            "nodeSelectorTerms": [{"matchExpressions": [expression]}]
                        }
                    }
                }
            }
            for expression in (
                {"key": "nvidia.com/gpu.product", "operator": "NotIn", "values": [L4, "Tesla-T4"]},
                {"key": "nvidia.com/gpu.product", "operator": "In", "values": [A100, "NVIDIA-H200"]},
                {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["30000"]},
                {"key": "nvidia.com/gpu.family", "operator": "In", "values": ["ampere", "hopper"]},
                {"key": "nvidia.com/gpu.compute.minor", "operator": "Lt", "values": ["9"]},
            )
        ),
    ],
)
def test_a_card_that_the_pod_excludes_is_not_chosen(stocked: RunningService, spec: dict[str, Any]) -> None:
    """It would wait for a node for ever."""
    _, pod = review(stocked, spec=spec)
    assert environment(pod)["AUTOBATCH_MICRO_BATCH_SIZE"] == "32"
    assert products(pod) == [A100]


def test_a_pod_that_was_patched_is_left_as_it_is(stocked: RunningService) -> None:
    """The API server may ask again after another webhook."""
    _, pod = review(stocked)
    again = copy.deepcopy(REVIEW)
    again["request"]["object"] = pod
    response, same = send(stocked, again)
    assert "patch" not in response
    assert "warnings" not in response
    assert same == pod


@pytest.mark.parametrize(
    "own",
    [
        {"name": "AUTOBATCH_MICRO_BATCH_SIZE", "value": "4"},
        {"name": "AUTOBATCH_TARGET", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "AUTOBATCH_RANK_MICRO_BATCH_SIZES", "value": "4;4"},  # which our plan leaves unset
        {"name": "AUTOBATCH_RANK_MICRO_BATCH_SIZES"},
    ],
)
def test_a_container_with_a_plan_of_its_own_is_left_alone(stocked: RunningService, own: dict[str, Any]) -> None:
    """Half of one plan and half of another are none, and the cards of ours say nothing of its own."""
    response, pod = review(stocked, train={"env": [own]})
    assert f"container train sets {own['name']} itself" in only_noted(response, pod)
    assert pod["spec"]["containers"][1]["env"] == [own]


def test_variables_that_are_no_plans_are_no_hindrance(stocked: RunningService) -> None:
    """Where its plan file, its cache and its service are."""
    own = [{"name": f"AUTOBATCH_{name}", "value": "x"} for name in ("PLAN_FILE", "CACHE", "SERVICE", "TOKEN")]
    _, pod = review(stocked, train={"env": own})
    assert pod["spec"]["containers"][1]["env"][:4] == own
    assert environment(pod)["AUTOBATCH_MICRO_BATCH_SIZE"] == "16"


def test_all_pods_of_a_job_are_told_the_same(stocked: RunningService) -> None:
    """Whatever is measured in between: ranks that accumulate differently would wait for each other for ever."""
    owned = {
        "ownerReferences": [{"kind": "Job", "name": "j", "apiVersion": "batch/v1", "uid": "one", "controller": True}]
    }
    _, first = review(stocked, {"gpus": "A10"}, metadata=owned)
    assert environment(first) == {}
    asked = {"gpus": "H100", "target": "512"}
    keep(stocked, "H100-SXM5-80GB", 200, target=512)
    _, first = review(stocked, asked, metadata=owned)
    keep(stocked, "H100-SXM5-80GB", 100, target=512)
    _, second = review(stocked, asked, metadata=owned)
    assert environment(first) == environment(second)
    assert environment(first)["AUTOBATCH_MICRO_BATCH_SIZE"] == "128"
    other = {"ownerReferences": [{**owned["ownerReferences"][0], "uid": "two"}]}
    _, third = review(stocked, asked, metadata=other)
    assert environment(third)["AUTOBATCH_MICRO_BATCH_SIZE"] == "64"
    # Nobody's Pod has no others, and another question of the same job has its own answer.
    assert (
        environment(review(stocked, asked, metadata={"ownerReferences": []})[1])["AUTOBATCH_MICRO_BATCH_SIZE"] == "64"
    )
    assert environment(review(stocked, {**asked, "target": "64"}, metadata=owned)[1])["AUTOBATCH_TARGET"] == "64"


@pytest.mark.parametrize(
    "spec",
    [
        {"nodeName": "node-7"},
        {
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [
                            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-7"]}]}
                        ]
                    }
                }
            }
        },
    ],
)
def test_a_pod_that_names_its_node_is_left_alone(stocked: RunningService, spec: dict[str, Any]) -> None:
    """As those of a DaemonSet do: its card is not known here, and another affinity would keep it from its node."""
    assert "bound to a node by its name" in only_noted(*review(stocked, spec=spec))


def test_cards_that_the_cluster_has_not_are_not_asked_for(tmp_path: Path) -> None:
    """The operator lists those that there are, by any name."""
    settings = make_settings(tmp_path, cluster_gpus="NVIDIA-A100-SXM4-40GB, t4")
    with running_service(settings, executor=FakeExecutor(succeeding)) as running:
        for gpu, largest in (("A100-SXM4-40GB", 37), ("L4", 17)):
            keep(running, gpu, largest)
        assert products(review(running)[1]) == [A100]


def test_a_card_that_only_an_emulation_knows_is_no_company_of_a_measured_one(tmp_path: Path) -> None:
    """What is told, basis and measurement, is true wherever the Pod goes."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as running:
        keep(running, "L4", 17, basis="measured")
        keep(running, "A100-SXM4-40GB", 37)
        _, pod = review(running)
        assert (products(pod), environment(pod)["AUTOBATCH_BASIS"]) == ([L4], "measured")


def test_containers_and_affinity_can_be_chosen(stocked: RunningService) -> None:
    """A GPU may come by other ways than a limit, and the scheduler may know its nodes by other labels."""
    response, pod = review(stocked, {"containers": "log-shipper,train", "affinity": "none"})
    assert environment(pod, 0) == environment(pod, 1)
    assert "affinity" not in pod["spec"]
    assert "warnings" not in response


def test_a_pod_that_asks_for_nothing_goes_by_in_silence(stocked: RunningService) -> None:
    """So does every update, and a Pod without annotations."""
    for change in ({"annotations": {"team": "x"}}, {"annotations": None}, {}):
        asked = copy.deepcopy(REVIEW)
        asked["request"]["object"]["metadata"].pop("annotations")
        asked["request"]["object"]["metadata"] |= change
        assert send(stocked, asked)[0] == {"uid": asked["request"]["uid"], "allowed": True}
    assert review(stocked, operation="UPDATE")[0] == {"uid": REVIEW["request"]["uid"], "allowed": True}


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ({"target": "lots"}, "autobatch/target is 'lots', wanted is a whole number from 1 to 999999999"),
        ({"target": "0"}, "autobatch/target is '0'"),
        ({"workload": " "}, "autobatch/workload is missing"),
        ({"workload": "gtp2"}, "unknown-workload"),
        ({"gpus": "L5"}, "unknown-gpu"),
        ({"gpus": "A100"}, "several cards go by that name"),
        ({"gpus": "NVIDIA-L4-SHARED"}, "a card that several Pods share"),
        ({"split": "both"}, "autobatch/split is 'both', wanted is even or balanced"),
        ({"tartget": "8"}, "autobatch/tartget is unknown"),
        ({"containers": "trian"}, "autobatch/containers names trian, there are log-shipper, train"),
        ({"world-size": "3"}, "target 255 or 258 can be"),
        ({"world-size": "512"}, "target 256 is below world_size 512"),
        ({"gpus": "T4"}, "gpt2 for target 256 over 1 rank does not fit on T4: it will run out of memory"),
        ({"gpus": "B200"}, "no measurement says which card takes gpt2"),
        ({"basis": "measured"}, "no measurement says which card takes gpt2"),
    ],
)
def test_what_cannot_be_answered_is_admitted_with_a_warning(
    stocked: RunningService, annotations: dict[str, str], said: str
) -> None:
    """Unpatched, and whoever made it reads why."""
    assert said in only_noted(*review(stocked, annotations))


def test_a_pod_without_a_gpu_is_told_so(stocked: RunningService) -> None:
    """The limit is what makes it one for us."""
    assert "no container has a limit of nvidia.com/gpu" in only_noted(*review(stocked, train={"resources": {}}))
    shared = {"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4-SHARED"}}
    assert "node selection allows none of the cards" in only_noted(*review(stocked, spec=shared))


def test_a_store_that_hangs_or_is_away_holds_no_pod_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is admitted while the store still hangs, and likewise where it fails in a way that nobody thought of."""
    release = threading.Event()
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as running:

        def hang(*_: object) -> tuple[tuple[()], tuple[()]]:
            release.wait(60)
            return (), ()

        keep(running, "T4", None)
        monkeypatch.setattr(running.services.measurements, "series", hang)
        try:
            response, _ = review(running)
            assert not release.is_set()
        finally:
            release.set()
        assert "no answer within 0.7 s" in response["warnings"][0]
        # What it was reading goes on, and answers those that come after.
        monkeypatch.undo()
        keep(running, "L4", 17)
        until = time.monotonic() + 20
        while not environment(review(running)[1]):
            assert time.monotonic() < until
        for error, said in (
            (StoreUnavailableError("away"), "the measurements cannot be read now"),
            (RuntimeError("secret"), "the service failed over this Pod"),
        ):

            def fail(*_: object, error: Exception = error) -> None:
                raise error

            keep(running, "L4", 18)
            monkeypatch.setattr(running.services.measurements, "series", fail)
            response, _ = review(running)
            assert said in response["warnings"][0]
            assert "secret" not in str(response)


def test_another_version_of_the_review_is_refused(stocked: RunningService) -> None:
    """The configuration asks for v1 alone; the API server takes a refusal for a failure, which admits the Pod."""
    asked = {**REVIEW, "apiVersion": "admission.k8s.io/v1beta1"}
    answered = stocked.client.post("/v1/kubernetes/mutate", json=asked)
    assert (answered.status_code, answered.json()["code"]) == (422, "invalid-request")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["metadata", "annotations", "autobatch/workload", "autobatch/target", "spec", "containers", "name", "env", "value",
             "resources", "limits", "nvidia.com/gpu", "affinity", "nodeAffinity", "nodeSelector", "key", "operator", "values",
             "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms", "matchExpressions"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(form=st.dictionaries(st.sampled_from(["metadata", "spec"]), _JSON, max_size=2))
def test_any_object_is_read(form: dict[str, Any]) -> None:
    """Nothing but a PodError comes of one that is no Pod."""
    pod = Pod(form)
    with contextlib.suppress(PodError):
        pod.question()
    assert isinstance(pod.allows({"nvidia.com/gpu.product": L4, "nvidia.com/gpu.memory": "23034"}), bool)
