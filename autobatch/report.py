"""What a probe found: the certificate, the trials behind it and the plan made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

# Imported at run time, not for type checking alone: the JSON form, and the service's own schemas, resolve the
# annotations below.
from autobatch.breakdown import MemoryBreakdown
from autobatch.errors import UsageError
from autobatch.jsonform import JsonValue, from_json_form, to_json_form
from autobatch.options import Objective, ProbeOptions
from autobatch.plan import Plan
from autobatch.trial import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "SCHEMA_VERSION",
    "Alternative",
    "Basis",
    "Cached",
    "Device",
    "Memory",
    "RankResult",
    "Report",
    "Versions",
    "describe_age",
    "fingerprint",
    "utc_timestamp",
]

SCHEMA_VERSION = 1
"""Changes when a field changes its meaning or goes; a new field does not change it."""

Basis = Literal["measured", "emulated"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """The card that the trials ran on."""

    name: str
    """As the driver names it."""
    uuid: str | None
    """`GPU-…` or `MIG-…`; None where the driver does not say."""
    total_bytes: int
    """Memory of the card as NVML reports it."""
    compute_capability: str | None
    """Like `8.0`."""
    driver: str | None
    """Version of the driver."""

    def __post_init__(self) -> None:
        if self.total_bytes < 1:
            raise ValueError(f"total_bytes {self.total_bytes} is below 1")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How the card's memory was shared out, in bytes."""

    budget_bytes: int
    """What a trial might use: the total less the driver's own part, other tenants and headroom; of the memory limit
    where that is less."""
    headroom_bytes: int
    """What was left free on purpose."""
    other_tenants_bytes: int | None
    """What other processes held; None where it could not be told."""
    context_bytes: int | None
    """What this process held outside the allocator: CUDA context and modules; None where no trial showed it."""

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "headroom_bytes", "other_tenants_bytes", "context_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} {value} is below 0; a missing figure is None")


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of what took part; None where unknown."""

    autobatch: str
    torch: str | None
    cuda: str | None


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What of a report was known before its probe began."""

    measured_at: str
    """When the newest of the earlier trials ran: ISO 8601 in UTC, ending in `Z`."""
    measurement: str
    """The id under which the cache keeps it."""
    num_trials: int
    """Trials of the report that ran earlier, and not again; 0 where the one that was known ran again."""
    confirmed: bool
    """True where one of them ran again and came out the same; False where they were trusted."""

    def __post_init__(self) -> None:
        _check_timestamp(self.measured_at)
        if self.num_trials < 0:
            raise ValueError(f"num_trials {self.num_trials} is below 0")


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What a probe of several ranks found on one of them."""

    device: Device
    budget_bytes: int
    """What a trial might use there."""
    max_micro_batch_size: int | None = None
    """The largest size in samples that fitted there, where each rank was searched for its own; else None."""
    smallest_failing: int | None = None
    """The smallest size in samples that failed there, where each rank was searched for its own; else None."""

    def __post_init__(self) -> None:
        for name, least in (("budget_bytes", 0), ("max_micro_batch_size", 1), ("smallest_failing", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value} is below {least}")


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """What a probe found with one thing changed."""

    change: str
    """What was changed, as it was asked for: `expandable_segments`, `headroom=0`, `checkpointing=true`."""
    plan: Plan | None
    """The plan for the target; None where nothing fits, or the probe could not be brought to its end."""
    max_micro_batch_size: int | None
    """The largest size in samples that fitted; None likewise."""
    smallest_failing: int | None
    """The smallest size in samples that was tried and did not fit; None where none failed."""
    certified: bool
    """As of a report."""
    problem: str = ""
    """Why there is no answer, in one line; empty where there is one, also where that is that nothing fits."""

    def __post_init__(self) -> None:
        if not self.change:
            raise ValueError("change is empty: it says what was changed")
        if self.problem and (self.plan is not None or self.max_micro_batch_size is not None):
            raise ValueError(f"problem {self.problem!r}, but a plan or max_micro_batch_size is there")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a probe found.

    The same object in the library, in the command line's JSON, over REST and in the cache.
    """

    schema_version: int = SCHEMA_VERSION
    """Version of this form."""
    basis: Basis
    """`measured` on a real GPU, or `emulated`."""
    workload: str
    """Name of the training job."""
    fingerprint: str
    """Hash of all that the figures depend on, see `fingerprint`."""
    plan: Plan | None
    """The plan for the target; None where nothing fits."""
    objective: Objective
    """What was looked for."""
    measured_at: str
    """When the probe ended: ISO 8601 in UTC, ending in `Z`."""
    micro_batches_per_step: int
    """Micro-batches before each optimizer step in the trial of the answer: 1 or 2."""
    max_micro_batch_size: int | None
    """The largest size in samples that fitted; None where nothing fits."""
    smallest_failing: int | None
    """The smallest size in samples that was tried and did not fit; None where none failed."""
    ceiling_reached: bool
    """True where the largest size worth trying fitted, so that nothing larger was tried."""
    monotone: bool
    """False where a size fitted above one that did not."""
    device: Device
    memory: Memory
    trials: tuple[Trial, ...]
    """In the order in which they ran, confirmations included."""
    versions: Versions
    options: ProbeOptions
    """What was asked."""
    certified: bool
    """True where the answer ran and fitted and its neighbour above ran and did not, or the ceiling was reached."""
    data_dependent: tuple[str, ...] = ()
    """Operators whose shapes come from values, which an emulated card does not have."""
    not_modelled: tuple[str, ...] = ()
    """What the emulated card leaves out."""
    expected_error: str = ""
    """The error to expect of an emulated answer; empty for a measured one."""
    warnings: tuple[str, ...] = ()
    """What the reader should know, one line each."""
    cached: Cached | None = None
    """What was known before; None where every trial ran in this probe."""
    ranks: tuple[RankResult, ...] | None = field(default=None, metadata={"omit_none": True})
    """Each rank of a probe that several ran together; the report's own device, memory, trials and maximum are those of the
    rank that bounds all, its plan may go beyond where ranks have sizes of their own. None where one process probed."""
    breakdown: MemoryBreakdown | None = field(default=None, metadata={"omit_none": True})
    """What the memory at the plan's size is made of; None where that was not asked for, or could not be found."""
    alternatives: tuple[Alternative, ...] | None = field(default=None, metadata={"omit_none": True})
    """What was found with one thing changed at a time; None where nothing of the kind was asked for."""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version {self.schema_version} is not {SCHEMA_VERSION}")
        if self.micro_batches_per_step not in (1, 2):
            raise ValueError(f"micro_batches_per_step {self.micro_batches_per_step} is neither 1 nor 2")
        _check_timestamp(self.measured_at)
        self._check_answer()
        self._check_basis()

    def _check_answer(self) -> None:
        largest = self.max_micro_batch_size
        if largest is None:
            if self.plan is not None or self.ceiling_reached or any(trial.fits for trial in self.trials):
                raise ValueError("max_micro_batch_size is None, but a plan, the ceiling or a trial says that one fits")
            return
        if largest < 1:
            raise ValueError(f"max_micro_batch_size {largest} is below 1; where nothing fits it is None")
        own = [rank.max_micro_batch_size for rank in self.ranks or () if rank.max_micro_batch_size is not None]
        if self.plan is not None and self.plan.micro_batch_size > max([largest, *own]):
            raise ValueError(
                f"the plan takes {self.plan.micro_batch_size}, above max_micro_batch_size {max([largest, *own])}"
            )
        if self.ceiling_reached and self.smallest_failing is not None:
            raise ValueError(f"ceiling_reached, but smallest_failing is {self.smallest_failing}")

    def _check_basis(self) -> None:
        if self.certified and self.data_dependent:
            raise ValueError("an answer with data_dependent operators is never certified")
        if self.basis == "measured" and (self.expected_error or self.not_modelled or self.data_dependent):
            raise ValueError("expected_error, not_modelled and data_dependent belong to emulated answers only")
        if self.basis == "emulated" and any(trial.is_timed for trial in self.trials):
            raise ValueError("an emulated card knows no time: seconds_per_step must be None")

    @property
    def num_sizes_tried(self) -> int:
        """Distinct sizes that the search tried, confirmations apart."""
        return len({trial.micro_batch_size for trial in self.trials if not trial.confirmation})

    @property
    def num_ooms(self) -> int:
        """Trials that ran out of memory."""
        return sum(trial.outcome is Outcome.OUT_OF_MEMORY for trial in self.trials)

    def to_dict(self) -> dict[str, JsonValue]:
        """Turn the report into what `json.dumps` takes."""
        form = to_json_form(self)
        if not isinstance(form, dict):  # the form of a dataclass is always an object
            raise TypeError(f"the report's JSON form is a {type(form).__name__}")
        return form

    def to_json(self, *, indent: int | None = None) -> str:
        """Write the report as JSON, on one line unless `indent` is given."""
        import json

        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Report:
        """Make a report from `to_dict`'s form.

        Raises:
            UsageError: of another schema version, or malformed; the message names the field.
        """
        version = data.get("schema_version") if hasattr(data, "get") else None
        if hasattr(data, "get") and (version != SCHEMA_VERSION or isinstance(version, bool)):
            found = "no schema_version" if version is None else f"schema_version {version!r}"
            raise UsageError(
                f"report has {found}, this autobatch reads {SCHEMA_VERSION}; "
                "probe again, or use the version of autobatch that wrote it"
            )
        return from_json_form(cls, data, where="report")

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Make a report from `to_json`'s text; raises as `from_dict` does."""
        import json

        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"report is not JSON ({error}); give what `autobatch probe --format json` wrote") from None
        return cls.from_dict(data)


def fingerprint(**facts: object) -> str:
    """Hash the facts that the figures of a report depend on.

    Two reports with the same fingerprint answer the same question: workload, parameters, card,
    total bytes, versions of torch and driver, allocator settings, and the options that a trial
    depends on.

    Args:
        facts: named values that have a JSON form; their order does not matter, their types do.

    Returns:
        16 hexadecimal digits, the same in every process and version of Python.

    Example:
        >>> fingerprint(workload="gpt2", total_bytes=1) == fingerprint(total_bytes=1, workload="gpt2")
        True
    """
    import hashlib
    import json

    text = json.dumps(to_json_form(facts), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def utc_timestamp() -> str:
    """Give the time now in the form of `Report.measured_at`, to the second."""
    import datetime as dt

    return dt.datetime.now(tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe_age(timestamp: str) -> str:
    """Say how long ago a time like `Report.measured_at` was, as people do: `5 minutes ago`."""
    import datetime as dt

    age = (dt.datetime.now(tz=dt.UTC) - dt.datetime.fromisoformat(timestamp)).total_seconds()
    for unit, seconds in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if age >= seconds:
            count = int(age // seconds)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def _check_timestamp(text: str) -> None:
    """Refuse anything but ISO 8601 in UTC."""
    import datetime as dt

    try:
        parsed = dt.datetime.fromisoformat(text)
    except ValueError:
        parsed = None
    if parsed is None or not text.endswith("Z"):
        raise ValueError(f"measured_at {text!r} is not a time in UTC like '2026-11-20T11:00:00Z'")
