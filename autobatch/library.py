"""The library call: probe a training loop in the process that will train."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from autobatch.emulation import describe_emulation
from autobatch.errors import UsageError, WorkloadError
from autobatch.facts import AnswerRemarks
from autobatch.options import ProbeOptions
from autobatch.probing import conduct_probe, itemized, nothing_fits
from autobatch.ranks.link import RankLink, num_ranks
from autobatch.report import RankResult
from autobatch.throughput import windows_per_trial
from autobatch.workload.inspection import inspect_job
from autobatch.workload.job import TrainingJob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from autobatch.breakdown import MemoryBreakdown
    from autobatch.cache.uses import CacheUse
    from autobatch.facts import DeviceFacts
    from autobatch.gpu.opening import OpenDevice
    from autobatch.known import KnownTrials
    from autobatch.probing import ProbeEvent
    from autobatch.ranks.trials import RankTrials
    from autobatch.report import Report
    from autobatch.snapshot import Snapshot
    from autobatch.trial import Trial
    from autobatch.workload.inspection import Inspection
    from autobatch.workload.running import TrialRunner

__all__ = ["RankSizes", "probe", "probe_on"]

RankSizes = Literal["same", "own"]
"""Whether ranks that probe together all get one size, or each its own."""
RANK_SIZES: tuple[str, ...] = get_args(RankSizes)


def probe(  # noqa: PLR0913 - what each caller may choose
    micro_step: Callable[[int], object],
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    target: int,
    restore: Sequence[object],
    scaler: torch.amp.GradScaler | None = None,
    end_window: Callable[[], object] | None = None,
    workload: str = "micro_step",
    cache: CacheUse = "off",
    rank_sizes: RankSizes = "same",
    breakdown: bool = False,
    progress: Callable[[ProbeEvent], None] | None = None,
    **options: Any,
) -> Report:
    """Find the largest micro-batch that trains on this process's GPU, and plan for the target.

    Runs real training steps with the caller's own objects, and puts everything back bit for bit after each trial, also
    when it fails half-way: what `restore` names, the optimizers and the scaler, gradients, modes, and the random number
    generators of Python, NumPy and torch. Not covered are data iterators, generators of the caller's own, and plain
    Python attributes.

    Under `torchrun`, with a process group, every rank calls it alike, with the wrapped model (DDP, FSDP2) in `restore` and in
    `micro_step`. Each trial is one of all ranks, gradients synchronised: it fits where it fits on every rank, and one that
    runs out of memory ends it for all. All ranks return the same report, whose device is the one with the least to give.

    Args:
        micro_step: called with n; builds the *largest* batch of n samples that training will see, runs forward and
            `backward()`, and does not step.
        optimizer: what steps at the end of a window, or several.
        target: samples per optimizer step, over all ranks.
        restore: the models, schedulers and whatever else the micro-step changes; `[]` where nothing is to be put back
            but the optimizer. The optimizer's parameters belong to the model: name it here.
        scaler: the GradScaler by which `micro_step` scales its loss.
        end_window: what ends a window in place of stepping and zeroing the optimizers, such as clipping first.
        workload: a name for the report, and for what is remembered.
        cache: `"confirm"` answers from what earlier runs of this script measured, once a single trial has come out as it did
            then; `"trust"` without any trial, where the script is unchanged; `"off"` neither reads nor keeps anything. A run is
            known by the script, `workload`, the code of `micro_step` and the shapes of the optimizer's parameters: what else
            its memory depends on, such as a length read from a file, belongs into the name.
        rank_sizes: where several ranks probe, `"same"` gives all the size that the weakest device can take; `"own"`, with
            `split="balanced"`, searches for each rank's own and shares out the target in proportion: the report's
            `ranks` has each one's maximum, its plan each one's micro-batches, as many on every rank.
        breakdown: whether the report says what the memory at the plan's size is made of: one trial more. Not for several ranks.
        progress: called with each event of the probe.
        **options: the device is the one of the optimizer's parameters where `device` does not name one; `trial_timeout`
            concerns trials in a process of their own; here it is how long ranks wait for each other. `world_size` is the
            number of ranks in `torch.distributed`, 1 without. The other fields of `ProbeOptions` as they are, such as
            `headroom="1GiB"`.

    Returns:
        The report; `report.plan` has the sizes.

    Raises:
        NothingFitsError: not even the smallest size fits; its `trials` show it.
        NoGpuError: this process has no NVIDIA GPU that torch and NVML see.
        PlanError: the target cannot be hit under the split.
        UsageError: an argument has no meaning.
        WorkloadError: the micro-step failed, but not for want of device memory; or a rank is gone, or did not come in time.
            What went wrong on another rank names it.
        BusyError: others took the GPU's memory meanwhile, or the deadline passed.

    Example:
        >>> report = autobatch.probe(micro_step, optimizer=optimizer, target=256, restore=[model])  # doctest: +SKIP
        >>> report.plan.micro_batch_size, report.plan.accumulation_steps  # doctest: +SKIP
        (32, 8)
    """
    from autobatch.cache.consultation import Consultation
    from autobatch.cache.identity import function_identity
    from autobatch.cache.sources import loaded_files
    from autobatch.cache.uses import check_cache_use
    from autobatch.gpu.opening import open_device

    check_cache_use(cache)
    job = TrainingJob(micro_step=micro_step, optimizer=optimizer, scaler=scaler, end_window=end_window)
    options.setdefault("device", _device_of(job))
    if num_ranks() > 1:
        if breakdown:
            raise UsageError("breakdown=True is not there for several ranks: leave it out, or probe one of them alone")
        asked_of_ranks = _RankQuestion(target=target, options=options, cache=cache, rank_sizes=rank_sizes)
        return _with_plan(_probe_over_ranks(asked_of_ranks, job, restore=restore, workload=workload, progress=progress))
    _check_rank_sizes(rank_sizes, num_ranks=1)
    asked = _options(target, options)
    consultation = Consultation(function_identity(workload, job), asked, cache, progress)
    with open_device(asked) as device:
        known = consultation.recall(device.facts)
        report = probe_on(
            device,
            job,
            asked,
            restore=restore,
            workload=workload,
            known=known,
            confirm=consultation.confirms,
            breakdown=breakdown,
            keep=lambda found: consultation.keep(found, device.facts, loaded_files),
            progress=progress,
        )
    return _with_plan(report)


def _with_plan(report: Report) -> Report:
    if report.plan is None:
        raise nothing_fits(report)
    return report


@dataclass(frozen=True, kw_only=True)
class _RankQuestion:
    """What one of several ranks asks."""

    target: int
    options: dict[str, Any]
    cache: CacheUse
    rank_sizes: RankSizes

    def checked(self, link: RankLink) -> ProbeOptions:
        """The options, with as many ranks as there are unless fewer hold the data.

        Raises:
            UsageError: other ranks than there are, a cache, or sizes of their own without a balanced split.
        """
        if self.cache != "off":
            raise UsageError(f"cache={self.cache!r} is not there for several ranks yet: leave it out, or cache='off'")
        asked = _options(self.target, {"world_size": link.world_size, **self.options})
        _check_rank_sizes(self.rank_sizes, num_ranks=link.world_size, split=asked.split, objective=asked.objective)
        if link.world_size % asked.world_size:
            raise UsageError(
                f"world_size {asked.world_size} does not divide the {link.world_size} ranks that run: leave it out, or give "
                "those that see data of their own (ranks that share a model's layers see the same)"
            )
        if self.rank_sizes == "own" and asked.world_size != link.world_size:
            raise UsageError(
                f"rank_sizes='own' needs data of its own on each of the {link.world_size} ranks, and world_size is "
                f"{asked.world_size}: take rank_sizes='same'"
            )
        return asked


def _check_rank_sizes(rank_sizes: object, *, num_ranks: int, split: str = "balanced", objective: str = "max") -> None:
    if rank_sizes not in RANK_SIZES:
        raise UsageError(f"rank_sizes {rank_sizes!r} is unknown; choose {' or '.join(RANK_SIZES)}")
    if rank_sizes == "own" and num_ranks == 1:
        raise UsageError("rank_sizes='own' is for several ranks, and this process trains alone: leave it out")
    if rank_sizes == "own" and split != "balanced":
        raise UsageError(f"rank_sizes='own' mixes sizes, and split is {split!r}: give split='balanced' too")
    if rank_sizes == "own" and objective == "throughput":
        raise UsageError("rank_sizes='own' gives each rank its largest size, whatever its speed: take objective='max'")


def _probe_over_ranks(
    question: _RankQuestion,
    job: TrainingJob,
    *,
    restore: Sequence[object],
    workload: str,
    progress: Callable[[ProbeEvent], None] | None,
) -> Report:
    """Probe together with the other ranks: each trial is one of all, and all come to the same report."""
    from autobatch.gpu.opening import open_device
    from autobatch.ranks.agreement import Question, check_devices, check_same_question, together
    from autobatch.ranks.trials import RankTrials

    with _open_link(question.options) as link, contextlib.ExitStack() as stack:
        asked = together(link, lambda: question.checked(link))
        check_same_question(link.exchange(Question.of(job, asked, workload=workload, rank_sizes=question.rank_sizes)))
        device = together(link, lambda: stack.enter_context(open_device(asked)))
        named = link.exchange((device.facts, asked.device))
        facts = [each for each, _ in named]
        check_devices(facts)
        local = together(link, lambda: _trials_of_rank(device, job, asked, restore))
        trials = RankTrials(local, link, facts, deadline_seconds=asked.deadline)
        with local.put_back_at_the_end():
            report = conduct_probe(
                trials,
                dataclasses.replace(asked, deadline=None),  # all ranks pass it together, or none
                workload=workload,
                progress=progress,
            )
            report = _with_ranks(report, trials, facts, question.rank_sizes, progress)
    # One report for all: that of the rank whose device bounds them.
    return dataclasses.replace(report, options=dataclasses.replace(asked, device=named[facts.index(trials.facts)][1]))


def _trials_of_rank(
    device: OpenDevice, job: TrainingJob, options: ProbeOptions, restore: Sequence[object]
) -> _OwnTrials:
    """This rank's trials; raises `UsageError` where `restore` leaves a wrapper out, which a failed trial leaves half-way."""
    from autobatch.snapshot.wrapped import unnamed_wrapper

    trials = _OwnTrials.of(device, job, options, restore)
    groups = (group for optimizer in job.optimizers() for group in optimizer.param_groups)
    wrapper = unnamed_wrapper(restore, (parameter for group in groups for parameter in group["params"]))
    if wrapper is not None:
        raise UsageError(
            f"the model is in {wrapper}, which restore does not name: give the wrapped model, as in restore=[model], so that it "
            "is made ready again after a trial that ends in the middle of a pass"
        )
    return trials


def _with_ranks(
    report: Report,
    trials: RankTrials,
    facts: Sequence[DeviceFacts],
    rank_sizes: RankSizes,
    progress: Callable[[ProbeEvent], None] | None,
) -> Report:
    """Add each rank's part to a report and, where one size for all accumulates and each may have its own, the plan of those."""
    from autobatch.ranks.agreement import describe_cards
    from autobatch.ranks.own_sizes import find_own_sizes

    ranks = tuple(RankResult(device=each.device, budget_bytes=each.memory.budget_bytes) for each in facts)
    unlike = describe_cards(facts)
    if rank_sizes == "same" or report.plan is None or report.plan.accumulation_steps == 1:
        return dataclasses.replace(report, ranks=ranks, warnings=(*report.warnings, *filter(None, [unlike])))
    plan, brackets = find_own_sizes(trials, facts, report.options, progress)
    found = [
        dataclasses.replace(rank, max_micro_batch_size=bracket.fits, smallest_failing=bracket.fails)
        for rank, bracket in zip(ranks, brackets, strict=True)
    ]
    return dataclasses.replace(report, plan=plan, ranks=tuple(found))


def _open_link(options: dict[str, Any]) -> RankLink:
    """The link of ranks that wait for each other as long as a trial may take, where that is a time at all."""
    limit = options.get("trial_timeout", _DEFAULTS["trial_timeout"])
    is_time = isinstance(limit, (int, float)) and limit > 0
    return RankLink(float(limit) if is_time else None)  # what is no time is refused with the other options


def probe_on(  # noqa: PLR0913 - what `probe` and the integrations choose
    device: OpenDevice,
    job: TrainingJob,
    options: ProbeOptions,
    *,
    restore: Sequence[object],
    workload: str,
    known: KnownTrials | None = None,
    confirm: bool = True,
    breakdown: bool = False,
    keep: Callable[[Report], None] | None = None,
    progress: Callable[[ProbeEvent], None] | None = None,
) -> Report:
    """Probe a job of the caller's own on a device that is open, and put everything back; raises as `probe` does.

    `keep` is called with the report as soon as it stands, before its memory is taken apart.
    """
    trials = _OwnTrials.of(device, job, options, restore)
    with trials.put_back_at_the_end():
        report = conduct_probe(
            trials,
            options,
            workload=workload,
            known=known,
            confirm=confirm,
            progress=progress,
        )
        if keep is not None:
            keep(report)
        return itemized(report, trials.itemize, progress) if breakdown else report


def _device_of(job: TrainingJob) -> str:
    """The first CUDA device that the optimizers' parameters are on; `cuda:0` where none is."""
    groups = (group for optimizer in job.optimizers() for group in optimizer.param_groups)
    devices = (parameter.device for group in groups for parameter in group["params"])
    return next((f"cuda:{device.index or 0}" for device in devices if device.type == "cuda"), "cuda:0")


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ProbeOptions)}


def _options(target: int, options: dict[str, Any]) -> ProbeOptions:
    if unknown := sorted(set(options) - set(_DEFAULTS)):
        raise UsageError(f"probe() has no option {', '.join(unknown)}: it takes {', '.join(sorted(_DEFAULTS))}")
    if options.get("emulate") is not None or options.get("tenant"):
        raise UsageError(
            "a process cannot be given an emulated GPU once it runs: start it with `autobatch emulate GPU -- python …`, "
            "or use `autobatch probe --emulate GPU`"
        )
    return ProbeOptions(target=target, **options)


def _distinct(objects: Sequence[object]) -> list[object]:
    """Each object once, in order: the caller may have named the optimizer in `restore` too."""
    return list({id(value): value for value in objects}.values())


class _OwnTrials:
    """Trials in this process."""

    def __init__(self, device: OpenDevice, runner: TrialRunner, job: TrainingJob, snapshot: Snapshot) -> None:
        self._device, self._runner, self._job, self._snapshot = device, runner, job, snapshot
        self._inspection: Inspection | None = None

    @classmethod
    def of(cls, device: OpenDevice, job: TrainingJob, options: ProbeOptions, restore: Sequence[object]) -> Self:
        """Keep what the trials change.

        Raises:
            UsageError: it cannot be put back.
        """
        from autobatch.snapshot import Snapshot
        from autobatch.workload.running import TrialRunner

        if not isinstance(restore, Sequence) or isinstance(restore, str):
            raise UsageError(
                f"restore is a {type(restore).__name__}: pass a list of what the micro-step changes, as in restore=[model]"
            )
        kept = [*restore, *job.optimizers(), *([job.scaler] if job.scaler is not None else [])]
        snapshot = Snapshot.take(_distinct(kept))
        runner = TrialRunner(
            lambda: job,
            device.memory,
            min_windows=windows_per_trial(options),
            timed=device.facts.basis == "measured",
            after_trial=snapshot.restore,
        )
        return cls(device, runner, job, snapshot)

    @contextlib.contextmanager
    def put_back_at_the_end(self) -> Iterator[None]:
        """Put everything back, however the trials end."""
        is_lost = False
        try:
            yield
        except WorkloadError as error:
            is_lost = error.context_lost
            raise
        finally:
            if not is_lost:  # on a lost context nothing can be put back, and the attempt would hide the reason
                self._snapshot.restore()

    @property
    def facts(self) -> DeviceFacts:
        return self._device.facts

    def prepare(self, size: int) -> None:
        """Look at what an emulated card cannot tell of the job."""
        if self.facts.basis == "emulated" and self._inspection is None:
            self._inspection = inspect_job(lambda: self._job, self._device.memory, size)
            self._snapshot.restore()

    def attempt(self, window: Sequence[int], *, confirmation: bool) -> tuple[Trial, int]:
        """Run a trial once; gives it and what other processes took meanwhile."""
        return self._runner.attempt(tuple(window), confirmation=confirmation)

    def run_trial(self, window: Sequence[int], *, confirmation: bool) -> Trial:
        self.prepare(min(window))
        return self._runner(window, confirmation=confirmation)

    def itemize(self, window: Sequence[int]) -> MemoryBreakdown | None:
        """Run a window once more and take its memory apart; None where it did not fit this time."""
        return self._runner.itemize(window)

    def remarks(self) -> AnswerRemarks:
        if self.facts.basis == "measured":
            return AnswerRemarks()
        return describe_emulation(self._inspection, ()) if self._inspection else AnswerRemarks()
