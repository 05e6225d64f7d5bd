"""A Pod as the Kubernetes API server sends it: what its annotations ask for, which cards it allows, and the patch. Pure."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "ANSWER",
    "MEMORY_LABEL",
    "PREFIX",
    "PRODUCT_LABEL",
    "CardTerm",
    "Pod",
    "PodError",
    "PodQuestion",
    "note_for",
    "patch_for",
]

PREFIX = "autobatch/"
ANSWER = f"{PREFIX}answer"
"""The annotation in which a Pod is told what was decided."""
PRODUCT_LABEL = "nvidia.com/gpu.product"
MEMORY_LABEL = "nvidia.com/gpu.memory"
"""Labels of a node, by NVIDIA's GPU feature discovery (github.com/NVIDIA/k8s-device-plugin, docs/gpu-feature-discovery): the
card's name, and its memory in MiB as NVML's total."""
_GPU_RESOURCE = "nvidia.com/gpu"
# Labels by which controllers number the Pods of a job: Kubernetes' own Job, Kubeflow, JobSet, LeaderWorkerSet.
_NUMBERED = (
    "batch.kubernetes.io/job-completion-index",
    "training.kubeflow.org/replica-index",
    "jobset.sigs.k8s.io/job-index",
    "leaderworkerset.sigs.k8s.io/worker-index",
)
_KNOWN = ("workload", "target", "gpus", "world-size", "split", "basis", "containers", "affinity", "answer")
_REQUIRED_TERMS = "requiredDuringSchedulingIgnoredDuringExecution"


class PodError(Exception):
    """A Pod asks for something that has no meaning, or cannot be told a plan; the message says why, and the way out."""


@dataclass(frozen=True, kw_only=True)
class PodQuestion:
    """What the annotations of a Pod ask for."""

    workload: str
    target: int
    world_size: int
    gpus: tuple[str, ...]
    """Cards by any of their names, the preferred one first; empty for all that are known."""
    split: str
    basis: str | None
    containers: tuple[str, ...]
    """The containers that are told the plan."""
    sets_affinity: bool


@dataclass(frozen=True, kw_only=True)
class CardTerm:
    """Nodes that a Pod may go to: with one kind of card, and at least so much memory on it."""

    product: str
    """The label `nvidia.com/gpu.product`."""
    memory_mib: int
    """The label `nvidia.com/gpu.memory` must be above this."""

    def expressions(self) -> list[dict[str, Any]]:
        """The term's part of a node selector."""
        return [
            {"key": PRODUCT_LABEL, "operator": "In", "values": [self.product]},
            {"key": MEMORY_LABEL, "operator": "Gt", "values": [str(self.memory_mib)]},
        ]


class Pod:
    """A Pod's object, read as far as it concerns us."""

    def __init__(self, form: Mapping[str, Any]) -> None:
        """Take the object of an admission request; what is not there reads as empty."""
        self._metadata = _mapping(form.get("metadata"))
        self._spec = _mapping(form.get("spec"))

    @property
    def annotations(self) -> dict[str, str]:
        """Its annotations under our prefix, without it."""
        found = _mapping(self._metadata.get("annotations"))
        return {str(key).removeprefix(PREFIX): str(found[key]) for key in found if str(key).startswith(PREFIX)}

    @property
    def owner_uid(self) -> str:
        """The id of what made it, which is one for all Pods of a job; empty where a person did."""
        owners = self._metadata.get("ownerReferences")
        for owner in owners if isinstance(owners, list) else []:
            if _mapping(owner).get("controller") is True:
                return str(_mapping(owner).get("uid", ""))
        return ""

    @property
    def counts_itself_alone(self) -> bool:
        """Whether it seems to be one of several, and says nothing of the ranks of all."""
        labels = _mapping(self._metadata.get("labels"))
        return "world-size" not in self.annotations and any(label in labels for label in _NUMBERED)

    @property
    def is_bound(self) -> bool:
        """Whether it names its node, so that no other can be chosen."""
        fields = [_mapping(one) for term in self.required_terms() for one in term.get("matchFields") or []]
        return bool(self._spec.get("nodeName")) or any(one.get("key") == "metadata.name" for one in fields)

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """Its containers, without those that run before them."""
        found = self._spec.get("containers")
        return [_mapping(one) for one in found] if isinstance(found, list) else []

    @property
    def affinity(self) -> Mapping[str, Any]:
        """Its affinity."""
        return _mapping(self._spec.get("affinity"))

    def question(self) -> PodQuestion | None:
        """What is asked for; None where nothing is.

        Raises:
            PodError: an annotation has no meaning.
        """
        asked = self.annotations
        if not set(asked) - {"answer"}:
            return None
        for name in asked:
            if name not in _KNOWN:
                raise PodError(f"annotation {PREFIX}{name[:64]} is unknown, there are {', '.join(_KNOWN[:-1])}")
        for name in ("workload", "target"):
            if not asked.get(name, "").strip():
                raise PodError(f"annotation {PREFIX}{name} is missing: write {PREFIX}workload and {PREFIX}target")
        if self.is_bound:
            raise PodError("the Pod is bound to a node by its name, and which card is there is not known here")
        containers = self._told(_names(asked.get("containers", "")))
        gpus = sum(_gpus_of(one) for one in self.containers if one.get("name") in containers)
        return PodQuestion(
            workload=asked["workload"].strip(),
            target=_count("target", asked["target"]),
            world_size=_count("world-size", asked["world-size"]) if "world-size" in asked else max(1, gpus),
            gpus=_names(asked.get("gpus", "")),
            split=_choice("split", asked.get("split", "even"), ("even", "balanced")),
            basis=_choice("basis", asked["basis"], ("measured", "emulated")) if "basis" in asked else None,
            containers=containers,
            sets_affinity=_choice("affinity", asked.get("affinity", "required"), ("required", "none")) == "required",
        )

    def _told(self, named: Sequence[str]) -> tuple[str, ...]:
        """The containers that are told: those named, else those with a GPU."""
        there = [str(one.get("name")) for one in self.containers]
        for name in named:
            if name not in there:
                raise PodError(f"annotation {PREFIX}containers names {name[:64]}, there are {', '.join(there)[:100]}")
        found = named or [str(one.get("name")) for one in self.containers if _gpus_of(one)]
        if not found:
            raise PodError(f"no container has a limit of {_GPU_RESOURCE}: set one, or name them in {PREFIX}containers")
        return tuple(found)

    def allows(self, labels: Mapping[str, str]) -> bool:
        """Whether the Pod's own node selection may choose a node with these labels; others are taken as they need to be."""
        selector = _mapping(self._spec.get("nodeSelector"))
        if any(selector.get(key, value) != value for key, value in labels.items()):
            return False
        terms = self.required_terms()
        return not terms or any(_term_allows(term, labels) for term in terms)

    def required_terms(self) -> list[Mapping[str, Any]]:
        """The terms of its required node affinity, of which a node must meet one; empty where there is none."""
        node = _mapping(self.affinity.get("nodeAffinity"))
        terms = _mapping(node.get(_REQUIRED_TERMS)).get("nodeSelectorTerms")
        return [_mapping(one) for one in terms] if isinstance(terms, list) else []


def patch_for(
    pod: Pod, question: PodQuestion, *, variables: Mapping[str, str | None], terms: Sequence[CardTerm], answer: str
) -> list[dict[str, Any]]:
    """Make the JSON Patch (RFC 6902) that tells a Pod its plan and sends it to the cards that it fits on.

    A patch of a patched Pod changes nothing.

    Args:
        pod: the Pod.
        question: what it asked.
        variables: the environment variables, None for those that the plan leaves unset.
        terms: the cards; empty leaves its affinity alone.
        answer: what is noted in the annotation.

    Raises:
        PodError: a container says one of the variables otherwise by itself: a mixture would be no plan, and the cards are
            those of ours.
    """
    patch: list[dict[str, Any]] = []
    told = {name: value for name, value in variables.items() if value is not None}
    for index, container in enumerate(pod.containers):
        if container.get("name") not in question.containers:
            continue
        own = {name: value for name, value in _variables_of(container).items() if name in variables}
        other = sorted(name for name, value in own.items() if value is None or variables[name] != value)
        if other:
            name = container.get("name")
            raise PodError(
                f"container {name} sets {other[0]} itself: the Pod goes on with its own plan, to a node of its own"
            )
        missing = [{"name": name, "value": value} for name, value in told.items() if name not in own]
        if not container.get("env") and missing:
            patch.append({"op": "add", "path": f"/spec/containers/{index}/env", "value": missing})
        else:
            patch += [{"op": "add", "path": f"/spec/containers/{index}/env/-", "value": one} for one in missing]
    affinity = _with_terms(pod, terms)
    if affinity is not None:
        patch.append({"op": "add", "path": "/spec/affinity", "value": affinity})
    return [*patch, *note_for(pod, answer)]


def note_for(pod: Pod, answer: str) -> list[dict[str, Any]]:
    """Make the JSON Patch that notes an answer in the annotation of a Pod that asked; empty where it stands there."""
    if pod.annotations.get("answer") == answer:
        return []
    return [{"op": "add", "path": f"/metadata/annotations/{ANSWER.replace('/', '~1')}", "value": answer}]


def _with_terms(pod: Pod, terms: Sequence[CardTerm]) -> dict[str, Any] | None:
    """The Pod's affinity with every one of its terms narrowed to the cards; None where that changes nothing."""
    own = pod.required_terms()
    if not terms or (own and all(_is_narrowed(term, terms) for term in own)):
        return None
    narrowed = []
    for term in own or [{}]:
        if own and not (term.get("matchExpressions") or term.get("matchFields")):
            narrowed.append(dict(term))  # an empty term matches no node, and is to go on doing so
            continue
        expressions = list(term.get("matchExpressions") or [])
        narrowed += [{**term, "matchExpressions": expressions + card.expressions()} for card in terms]
    affinity: dict[str, Any] = copy.deepcopy(dict(pod.affinity))
    node = dict(_mapping(affinity.get("nodeAffinity")))
    affinity["nodeAffinity"] = {**node, _REQUIRED_TERMS: {"nodeSelectorTerms": narrowed}}
    return affinity


def _is_narrowed(term: Mapping[str, Any], terms: Sequence[CardTerm]) -> bool:
    """Whether a term was narrowed before."""
    found = list(_expressions(term))
    return any(all(one in found for one in card.expressions()) for card in terms) or not (
        found or term.get("matchFields")
    )


def _term_allows(term: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    found = list(_expressions(term))
    if not found and not term.get("matchFields"):
        return False
    return all(_expression_allows(one, labels[str(one.get("key"))]) for one in found if one.get("key") in labels)


def _expressions(term: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    found = term.get("matchExpressions")
    yield from (_mapping(one) for one in found) if isinstance(found, list) else ()


def _expression_allows(expression: Mapping[str, Any], value: str) -> bool:
    """Whether one requirement of a node selector holds for a label's value (its operators: k8s.io/api/core/v1)."""
    operator = expression.get("operator")
    wanted = [str(one) for one in expression.get("values") or []]
    if operator in {"Gt", "Lt"}:
        try:
            bound, here = int(wanted[0]), int(value)
        except (IndexError, ValueError):
            return False
        return here > bound if operator == "Gt" else here < bound
    return {"In": value in wanted, "NotIn": value not in wanted, "Exists": True}.get(str(operator), False)


def _gpus_of(container: Mapping[str, Any]) -> int:
    """The GPUs that a container has: its limit, which a request of them must equal."""
    limits = _mapping(_mapping(container.get("resources")).get("limits"))
    said = str(limits.get(_GPU_RESOURCE, "0"))
    return int(said) if said.isascii() and said.isdecimal() and len(said) < 6 else 0


def _variables_of(container: Mapping[str, Any]) -> dict[str, str | None]:
    """The variables that a container sets; None for a value that comes from elsewhere, or is not there."""
    found = container.get("env")
    listed = [_mapping(one) for one in found] if isinstance(found, list) else []
    return {str(one.get("name")): one.get("value") for one in listed}


def _count(name: str, text: str) -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 9 or int(digits) < 1:
        raise PodError(f"annotation {PREFIX}{name} is {text[:40]!r}, wanted is a whole number from 1 to 999999999")
    return int(digits)


def _choice(name: str, text: str, choices: Sequence[str]) -> str:
    if text.strip() not in choices:
        raise PodError(f"annotation {PREFIX}{name} is {text[:40]!r}, wanted is {' or '.join(choices)}")
    return text.strip()


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _mapping(value: object) -> Mapping[str, Any]:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}
