"""What a probe is asked: the one list of knobs, shared by the library, the command line and the service."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from autobatch.errors import UsageError
from autobatch.plan import LARGEST_LISTING, SPLITS, Plan, Split, check_int, check_split, check_target, make_plan
from autobatch.units import check_headroom, headroom_bytes, parse_bytes, parse_fraction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["OBJECTIVES", "Objective", "ProbeOptions"]

Objective = Literal["max", "plan", "throughput"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)

_FEWEST_WINDOWS = 3


def _knob(text: str, *, form: str, choices: Sequence[str] = ()) -> Mapping[str, Any]:
    """Describe one field: `help` for a reader, `form` for what stands after the flag, `choices` if closed."""
    return {"help": text, "form": form, "choices": tuple(choices)}


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What a probe is to find, on which device, and within which limits.

    Strings such as `"24GiB"` and `"1%"` are taken where a field says so, and turned into numbers.
    The metadata of each field holds its `help`, `form` and `choices`, from which faces are made.

    Raises:
        UsageError: a field is out of range or contradicts another.

    Example:
        >>> ProbeOptions(target=256, world_size=4, memory_limit="24GiB").share
        64
    """

    target: int = field(metadata=_knob("samples per optimizer step, over all ranks", form="N"))
    """Effective batch size: samples per optimizer step over all ranks, from `world_size` to 1,000,000,000."""
    world_size: int = field(default=1, metadata=_knob("data-parallel ranks", form="R"))
    """Data-parallel ranks, at least 1."""
    device: str = field(default="cuda:0", metadata=_knob("device to measure", form="DEVICE"))
    """The device, as torch names it (`cuda`, `cuda:1`)."""
    emulate: str | None = field(default=None, metadata=_knob("emulate this card instead of measuring one", form="GPU"))
    """Name of a card to emulate; None measures a real one."""
    tenant: str | int = field(
        default=0, metadata=_knob("memory that another tenant holds on the emulated card", form="BYTES")
    )
    """Bytes that another tenant holds on the emulated card, at least 0; only with `emulate`."""
    headroom: str | int = field(
        default="2%", metadata=_knob("memory of the card to leave free: bytes or a percentage", form="512MiB|3%")
    )
    """Memory to leave free: bytes, or a percentage of the card's total, from 0 to below the card.

    The card is the one stood in for where `memory_limit` names one.
    """
    memory_limit: str | int | None = field(
        default=None, metadata=_knob("stand in for a card with this much memory", form="24GiB")
    )
    """Bytes of the card that are there at all, at least 1; None means all of it."""
    max_micro_batch: int | None = field(default=None, metadata=_knob("largest micro-batch size to try", form="N"))
    """Largest micro-batch in samples to try, at least `multiple_of`; None means one rank's share."""
    multiple_of: int = field(default=1, metadata=_knob("micro-batch sizes are multiples of this", form="N"))
    """Samples that every micro-batch is a multiple of, from 1 to one rank's share."""
    split: Split = field(
        default="even",
        metadata=_knob("one micro-batch size for all, or sizes at most one apart", form="SPLIT", choices=SPLITS),
    )
    """`even`: one size for all steps and ranks. `balanced`: sizes at most one `multiple_of` apart, always exact."""
    tolerance: str | float = field(
        default=0.0, metadata=_knob("share of the target by which an even plan may miss it", form="1%")
    )
    """Share of the target by which an even plan may miss it, from 0 to below 1."""
    objective: Objective = field(
        default="max",
        metadata=_knob("what to look for among sizes that fit", form="OBJECTIVE", choices=OBJECTIVES),
    )
    """`max`: the largest size. `plan`: the fewest steps. `throughput`: the least time per effective batch."""
    dataset_size: int | None = field(
        default=None, metadata=_knob("samples in the data set, which no step may exceed", form="N")
    )
    """Samples in the data set, at least `target`; None means unknown."""
    min_windows: int = field(
        default=_FEWEST_WINDOWS, metadata=_knob("optimizer steps that each trial runs at least", form="N")
    )
    """Optimizer steps that each trial runs at least, 3 or more: later ones can fail where the first passed."""
    trial_timeout: float | None = field(
        default=600.0, metadata=_knob("seconds that one trial may take", form="SECONDS")
    )
    """Seconds that one trial may take, above 0; None means no limit."""
    deadline: float | None = field(
        default=None, metadata=_knob("seconds that the whole probe may take", form="SECONDS")
    )
    """Seconds that the whole probe may take, above 0; None means no limit."""

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_choices()
        self._check_memory()
        self._normalise("tolerance", parse_fraction(self.tolerance, name="tolerance"))
        self._normalise("trial_timeout", _seconds("trial_timeout", self.trial_timeout))
        self._normalise("deadline", _seconds("deadline", self.deadline))

    def _normalise(self, name: str, value: float | None) -> None:
        """Put the number in the place of the text; the value is frozen for everyone else."""
        object.__setattr__(self, name, value)

    def _check_counts(self) -> None:
        for name in ("target", "world_size", "multiple_of"):
            check_int(name, getattr(self, name), 1)
        check_target(self.target, world_size=self.world_size, dataset_size=self.dataset_size)
        check_int("min_windows", self.min_windows, _FEWEST_WINDOWS)
        share = -(-self.target // self.world_size)
        if self.multiple_of > share:
            raise UsageError(
                f"multiple_of {self.multiple_of} is above the {share} samples that each of {self.world_size} ranks "
                f"takes of target {self.target}; take --multiple-of {share} or less"
            )
        if self.max_micro_batch is None:
            return
        check_int("max_micro_batch", self.max_micro_batch, 1)
        if self.max_micro_batch < self.multiple_of:
            raise UsageError(
                f"max_micro_batch {self.max_micro_batch} is below multiple_of {self.multiple_of}, which leaves no size "
                f"to try; take --max-micro-batch {self.multiple_of} or more"
            )

    def _check_choices(self) -> None:
        check_split(self.split)
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective {self.objective!r} is unknown; choose {', '.join(OBJECTIVES)}")
        if not isinstance(self.device, str) or not self.device.strip():
            raise UsageError(f"device {self.device!r} is not the name of a device; write one like 'cuda:0'")
        if self.emulate is not None and (not isinstance(self.emulate, str) or not self.emulate.strip()):
            raise UsageError(f"emulate {self.emulate!r} is not the name of a card; write one like 'A100-SXM4-40GB'")

    def _check_memory(self) -> None:
        if isinstance(self.headroom, float):
            raise UsageError(f"headroom {self.headroom!r} is neither bytes nor a percentage; write '512MiB' or '3%'")
        check_headroom(self.headroom)
        tenant = parse_bytes(self.tenant, name="tenant")
        if tenant and self.emulate is None:
            raise UsageError(
                f"tenant {self.tenant!r} stands beside the job on an emulated card only; name one with --emulate, "
                "or leave --tenant out (on a real card other tenants are measured)"
            )
        self._normalise("tenant", tenant)
        if self.memory_limit is not None:
            limit = parse_bytes(self.memory_limit, name="memory_limit")
            if limit == 0:
                raise UsageError(f"memory_limit {self.memory_limit!r} leaves no memory; give at least 1 byte")
            self._normalise("memory_limit", limit)
            headroom_bytes(self.headroom, limit, whose="memory_limit")

    @property
    def tenant_bytes(self) -> int:
        """`tenant` in bytes."""
        return int(self.tenant)

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes, or None."""
        return None if self.memory_limit is None else int(self.memory_limit)

    @property
    def tolerance_fraction(self) -> float:
        """`tolerance` as a share of the target, from 0 to below 1."""
        return float(self.tolerance)

    @property
    def share(self) -> int:
        """Samples that the fullest rank takes per optimizer step.

        ⌈target / world_size⌉; under `balanced`, whose ranks take whole multiples of `multiple_of`,
        rounded up to one where the target can be split so at all.
        """
        share = -(-self.target // self.world_size)
        if self.split == "balanced" and self.target % self.multiple_of == 0:
            return -(-share // self.multiple_of) * self.multiple_of
        return share

    @property
    def ceiling(self) -> int:
        """The largest size worth trying, a multiple of `multiple_of` and at least that."""
        largest = self.share if self.max_micro_batch is None else min(self.share, self.max_micro_batch)
        return largest // self.multiple_of * self.multiple_of

    def headroom_bytes(self, total_bytes: int) -> int:
        """Resolve `headroom` against a card of `total_bytes`, or the smaller one that `memory_limit` stands in for.

        Raises:
            UsageError: nothing is left.
        """
        limit = self.memory_limit_bytes
        return headroom_bytes(self.headroom, total_bytes if limit is None else min(total_bytes, limit))

    @property
    def can_be_one_size(self) -> bool:
        """Whether a plan may come out with one micro-batch size for all steps and ranks.

        False where each plan mixes sizes, whatever fits: `balanced`, and the ranks' shares differ. True says only that
        it depends on what fits.
        """
        return self.split == "even" or self.target % (self.world_size * self.multiple_of) == 0

    def candidates(self) -> Sequence[int]:
        """List the sizes that the objective may answer with, smallest first, never empty.

        For `plan` these are the sizes at which the number of steps changes: ⌈share / k⌉, rounded up
        to `multiple_of`. Cost: O(√share).
        """
        unit, ceiling = self.multiple_of, self.ceiling
        if self.objective != "plan" or self.tolerance_fraction:
            return range(unit, ceiling + 1, unit)  # under a tolerance the steps change at sizes of any kind
        # ⌈share/k⌉ is (share - 1)//k + 1, and k can jump to where the quotient next falls.
        rest, steps, sizes = self.share - 1, 1, {unit}
        while steps <= rest:
            quotient = rest // steps
            sizes.add(-(-(quotient + 1) // unit) * unit)
            steps = rest // quotient + 1
        return sorted(size for size in sizes if size <= ceiling)

    def micro_batches_per_step(self, micro_batch_size: int) -> int:
        """Tell how many micro-batches a trial runs before each optimizer step: 1, or 2 when training accumulates."""
        check_int("micro_batch_size", micro_batch_size, 1)
        return min(2, -(-self.share // micro_batch_size))

    def make_plan(self, max_micro_batch_size: int, *, most_listed: int = LARGEST_LISTING) -> Plan:
        """Plan with these options for the largest size that fits; raises `PlanError` as `plan.make_plan` does.

        Asked with `ceiling` before any trial, it shows early that a target cannot be hit: whether an
        even plan exists does not depend on the size.
        """
        return make_plan(
            target=self.target,
            max_micro_batch_size=max_micro_batch_size,
            world_size=self.world_size,
            split=self.split,
            multiple_of=self.multiple_of,
            tolerance=self.tolerance,
            dataset_size=self.dataset_size,
            most_listed=most_listed,
        )


def _seconds(name: str, value: object) -> float | None:
    """Check a time limit."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{name} {value!r} is not a number of seconds; give one above 0")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not 0 < seconds < math.inf:
        raise UsageError(f"{name} {value} is not above 0 and finite; give a number of seconds like 600")
    return seconds
