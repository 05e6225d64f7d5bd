"""What is decided about a Pod that is about to be made: its plan, and the cards that the plan is known to fit on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from autobatch import Card, PlanError, find_card, load_catalogue, plan_variables
from autobatch_server.admissions import Chosen
from autobatch_server.answers import Answer, KnownSeries, answer_question
from autobatch_server.gpus import GpuProblem, canonical_gpu
from autobatch_server.pods import (
    MEMORY_LABEL,
    PREFIX,
    PRODUCT_LABEL,
    CardTerm,
    Pod,
    PodError,
    PodQuestion,
    note_for,
    patch_for,
)
from autobatch_server.problems import ProblemError
from autobatch_server.questions import make_options, refuse_plan
from autobatch_server.workloads import WorkloadProblem

if TYPE_CHECKING:
    from autobatch import Plan, ProbeOptions
    from autobatch_server.schemas import SplitName
    from autobatch_server.services import Services

__all__ = ["Decision", "decide"]

# Two cards of a kind differ a little in the memory that their driver reports; cards of two kinds by gigabytes.
_SAME_MEMORY = 0.98
_MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a Pod; it is admitted in any case."""

    patch: tuple[dict[str, Any], ...] = ()
    """A JSON Patch; empty where the Pod stays as it is."""
    warnings: tuple[str, ...] = ()
    """What whoever made the Pod is shown."""
    verdict: str = ""
    """`fits`, `does_not_fit` or `unknown`; empty where nothing was asked, or nothing that has an answer."""
    measurement: str | None = None


async def decide(services: Services, form: dict[str, Any], *, namespace: str = "") -> Decision:
    """Decide about a Pod.

    The first card that the job fits on, in the order of the Pod's own list or from the least memory up, gives the plan. Further
    cards are allowed where that same plan is known to fit. All Pods of one owner that ask the same are told the same.

    Args:
        services: whose measurements answer.
        form: the Pod's object.
        namespace: where it is made.

    Raises:
        StoreUnavailableError: the database is away.
    """
    pod = Pod(form)
    try:
        question = pod.question()
        if question is None:
            return Decision()
        owner = pod.owner_uid
        chosen = services.admissions.get((namespace, owner, question)) if owner else None
        if chosen is None:
            async with services.admissions.reading:
                found = await _choose(services, pod, question)
            if isinstance(found, Decision):
                return found
            chosen = found
            if owner:
                services.admissions.put((namespace, owner, question), chosen)
        return _tell(pod, question, chosen)
    except PodError as error:
        return _without_plan(pod, str(error))
    except (ProblemError, WorkloadProblem, GpuProblem) as error:
        return _without_plan(pod, f"{error.detail} ({error.code})")


def _without_plan(pod: Pod, reason: str, verdict: str = "") -> Decision:
    """The Pod goes on as it is; why is noted in it too, for a Job's Pods are made by a controller that heeds no warning."""
    return Decision(patch=tuple(note_for(pod, f"none: {reason}")), warnings=(reason,), verdict=verdict)


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A card with what is known of the job on it."""

    card: Card
    series: KnownSeries
    answer: Answer


async def _choose(services: Services, pod: Pod, question: PodQuestion) -> Chosen | Decision:
    """Choose a plan and cards, or decide that there is none."""
    job = str(services.catalogue.find(question.workload))
    options = make_options(
        target=question.target, world_size=question.world_size, split=cast("SplitName", question.split)
    )
    cards = _candidates(pod, question, services.settings.cluster_gpus)
    if not cards:
        raise PodError(f"the Pod's own node selection allows none of the cards that could be chosen by {PRODUCT_LABEL}")
    number = await services.freshness.number()
    series = await services.known_on_cards(number, job, [card.name for card in cards])
    known: list[_Known] = []
    for card in cards:
        try:
            answer = answer_question(
                series[card.name], workload=job, gpu=card.name, options=options, basis=question.basis
            )
        except PlanError as error:  # by what fits on this card; the target may be split by what fits on another
            impossible = refuse_plan(options, error)
            continue
        known.append(_Known(card=card, series=series[card.name], answer=answer))
    if not known:
        raise impossible
    for one in known:
        plan, measurement = one.answer.plan, one.answer.measurement
        if plan is None or measurement is None:
            continue
        basis = measurement.report.basis
        others = [other.card for other in known if other is not one and _holds_plan(other, plan, options, basis)]
        return Chosen(plan=plan, cards=(one.card, *others), basis=basis, measurement=measurement.id)
    return _none(pod, job, question, known)


def _candidates(pod: Pod, question: PodQuestion, of_the_cluster: tuple[str, ...]) -> list[Card]:
    """The cards in the order in which they are tried: those listed, or all from the least memory up; no forbidden one."""
    if question.gpus:
        for name in question.gpus:
            if name.upper().endswith("-SHARED"):
                raise PodError(f"{name[:64]} is a card that several Pods share, and a plan is for a whole one")
        found = [find_card(name) for name in dict.fromkeys(map(canonical_gpu, question.gpus))]
    else:
        there = [card for card in load_catalogue() if not of_the_cluster or card.name in of_the_cluster]
        found = sorted(there, key=lambda card: card.nvml_total_bytes)
    return [card for card in found if pod.allows(_labels(card))]


# Names by compute capability, as NVIDIA's GPU feature discovery gives them (github.com/NVIDIA/k8s-device-plugin,
# internal/lm/resource.go, getArchFamily): the least capability of each.
_FAMILIES = {
    (7, 0): "volta",
    (7, 5): "turing",
    (8, 0): "ampere",
    (8, 9): "ada-lovelace",
    (9, 0): "hopper",
    (10, 0): "blackwell",
}


def _labels(card: Card) -> dict[str, str]:
    major, minor = card.compute_capability
    return {
        PRODUCT_LABEL: card.kubernetes_product,
        MEMORY_LABEL: str(card.nvml_total_bytes // _MIB),
        "nvidia.com/gpu.family": _FAMILIES[max(least for least in _FAMILIES if least <= (major, minor))],
        "nvidia.com/gpu.compute.major": str(major),
        "nvidia.com/gpu.compute.minor": str(minor),
    }


def _none(pod: Pod, job: str, question: PodQuestion, known: list[_Known]) -> Decision:
    """No card is known to fit: the Pod goes on as it is, and whoever made it hears why."""
    failing = [one for one in known if one.answer.verdict == "does_not_fit"]
    ranks = "1 rank" if question.world_size == 1 else f"{question.world_size} ranks"
    what = f"{job} for target {question.target} over {ranks}"
    if failing and len(failing) == len(known):
        names = ", ".join(one.card.name for one in failing)
        return _without_plan(pod, f"{what} does not fit on {names}: it will run out of memory", "does_not_fit")
    return _without_plan(pod, f"no measurement says which card takes {what}: POST /v1/probes makes one", "unknown")


def _tell(pod: Pod, question: PodQuestion, chosen: Chosen) -> Decision:
    """The Pod is told the plan, and goes to one of the cards that it is known to fit on."""
    plan = chosen.plan
    try:
        variables = plan_variables(plan, basis=chosen.basis, measurement=chosen.measurement)
    except PlanError as error:
        raise PodError(str(error)) from None
    sizes, names = "+".join(map(str, plan.sizes)), ", ".join(card.name for card in chosen.cards)
    try:
        patch = patch_for(
            pod,
            question,
            variables=variables,
            terms=[_term(card) for card in chosen.cards] if question.sets_affinity else [],
            answer=f"{sizes} x {plan.accumulation_steps} on {names} ({chosen.basis}, {chosen.measurement})",
        )
    except PodError as error:  # of the Pod's own plan: there was an answer
        return _without_plan(pod, str(error), "fits")
    warnings = list(plan.warnings)
    if pod.counts_itself_alone:
        own = "GPU is" if question.world_size == 1 else f"{question.world_size} GPUs are"
        warnings.append(f"this Pod is one of several, and its own {own} taken for all: write {PREFIX}world-size")
    return Decision(patch=tuple(patch), warnings=tuple(warnings), verdict="fits", measurement=chosen.measurement)


def _holds_plan(one: _Known, plan: Plan, options: ProbeOptions, basis: str) -> bool:
    """Whether what is known of another card, on the same basis, proves that it takes the very same plan."""
    capped = dataclasses.replace(options, max_micro_batch=max(plan.sizes))
    try:
        answer = answer_question(one.series, workload="", gpu=one.card.name, options=capped, basis=basis)
    except PlanError:
        return False
    found = answer.plan
    return found is not None and _sizes(found) == _sizes(plan)


def _sizes(plan: Plan) -> tuple[object, ...]:
    return (plan.rank_micro_batch_sizes, plan.accumulation_steps, plan.sizes)


def _term(card: Card) -> CardTerm:
    """Nodes with this card, and with all of its memory: no slice of it."""
    return CardTerm(product=card.kubernetes_product, memory_mib=int(card.nvml_total_bytes * _SAME_MEMORY) // _MIB)
