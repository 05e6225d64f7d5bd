"""What ranks must agree on before they probe together, and what they make of each other's answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from autobatch.errors import AutobatchError, UsageError, WorkloadError
from autobatch.trial import Outcome
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch.facts import DeviceFacts
    from autobatch.options import ProbeOptions
    from autobatch.ranks.link import RankLink
    from autobatch.trial import Trial
    from autobatch.workload.job import TrainingJob

__all__ = ["Question", "check_devices", "check_same_question", "describe_cards", "together", "weakest", "worst"]

# Each rank has a device of its own.
_RANKS_OWN = ("device",)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What one rank asks, as far as all must ask the same."""

    workload: str
    num_parameters: int
    """Elements of the optimizers' parameters, whole ones where each rank holds a part."""
    options: tuple[tuple[str, Any], ...]
    rank_sizes: str

    @classmethod
    def of(cls, job: TrainingJob, options: ProbeOptions, *, workload: str, rank_sizes: str) -> Question:
        """What this rank asks."""
        asked = dataclasses.asdict(options)
        groups = (group for optimizer in job.optimizers() for group in optimizer.param_groups)
        return cls(
            workload=workload,
            rank_sizes=rank_sizes,
            num_parameters=sum(parameter.numel() for group in groups for parameter in group["params"]),
            options=tuple((name, value) for name, value in asked.items() if name not in _RANKS_OWN),
        )

    def named(self) -> dict[str, Any]:
        """Everything in it by the name that its asker knows."""
        own = {"workload": self.workload, "rank_sizes": self.rank_sizes, "parameters to train": self.num_parameters}
        return {**dict(self.options), **own}


def check_same_question(questions: Sequence[Question]) -> None:
    """Refuse ranks that ask different things.

    Raises:
        UsageError: with the first thing in which two of them differ, and both values.
    """
    first = questions[0].named()
    for rank, question in enumerate(questions):
        for name, value in question.named().items():
            if value != first[name]:
                raise UsageError(
                    f"rank 0 has {name} {first[name]!r} and rank {rank} has {value!r}: every rank must ask the same"
                )


def check_devices(facts: Sequence[DeviceFacts]) -> None:
    """Refuse ranks that cannot be measured together.

    Raises:
        UsageError: some are on real cards and some on emulated ones, or two are on the same.
    """
    bases = [each.basis for each in facts]
    if len(set(bases)) > 1:
        raise UsageError(
            f"rank {bases.index('emulated')} is on an emulated card and rank {bases.index('measured')} on a real one: their "
            "figures cannot be mixed"
        )
    seen: dict[str, int] = {}
    for rank, each in enumerate(facts):
        if each.device.uuid is not None and (before := seen.setdefault(each.device.uuid, rank)) != rank:
            raise UsageError(
                f"ranks {before} and {rank} are on the same {each.device.name} ({each.device.uuid}): give each rank a device of "
                "its own, as by torch.cuda.set_device(int(os.environ['LOCAL_RANK']))"
            )


def weakest(facts: Sequence[DeviceFacts]) -> DeviceFacts:
    """The device with the least to give: what fits there bounds all."""
    return min(facts, key=lambda each: each.memory.budget_bytes)


def describe_cards(facts: Sequence[DeviceFacts]) -> str:
    """Say whose device decides where they are not alike; empty where they are, up to what differs between two of a kind."""
    names = {each.device.name for each in facts}
    least, most = (choose(each.memory.budget_bytes for each in facts) for choose in (min, max))
    if len(names) == 1 and most - least <= most // 50:
        return ""
    rank = facts.index(weakest(facts))
    return (
        f"the ranks' devices are not alike: rank {rank} ({facts[rank].device.name}) has a budget of {format_bytes(least)} and "
        f"others have up to {format_bytes(most)}; the smallest decides"
    )


def worst(trials: Sequence[Trial | None], facts: Sequence[DeviceFacts]) -> Trial:
    """One trial for all ranks: the one that failed, where one did; else the one that left its device the least room.

    Args:
        trials: by rank; None where a rank was stopped since another's was over.
        facts: by rank.
    """

    def badness(each: tuple[int, Trial]) -> tuple[bool, bool, int]:
        rank, trial = each
        over = trial.footprint_bytes - facts[rank].memory.budget_bytes
        return not trial.fits, trial.outcome is Outcome.OUT_OF_MEMORY, over

    rank, trial = max(((rank, trial) for rank, trial in enumerate(trials) if trial is not None), key=badness)
    if trial.fits or len(trials) == 1:
        return trial
    return dataclasses.replace(trial, note=f"rank {rank}" + (f": {trial.note}" if trial.note else ""))


def together(link: RankLink, action: Callable[[], _T]) -> _T:
    """Do something on every rank, and go on only where it went well on all.

    Raises:
        AutobatchError: a rank's own error, or another's with its rank.
    """
    error: AutobatchError | None = None
    try:
        result = action()
    except AutobatchError as raised:
        error = raised
    raise_first(error, link.exchange(error))
    return result


def raise_first(mine: AutobatchError | None, errors: Sequence[AutobatchError | None]) -> None:
    """Raise this rank's own error, or else the first of another rank, which it names.

    Raises:
        AutobatchError: where any rank has one.
    """
    if mine is not None:
        raise mine
    for rank, error in enumerate(errors):
        if isinstance(error, WorkloadError):
            raise WorkloadError(f"rank {rank}: {error}", traceback_text=error.traceback_text)
        if error is not None:
            raise type(error)(f"rank {rank}: {error}")
