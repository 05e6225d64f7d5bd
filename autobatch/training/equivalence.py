"""Whether accumulation equals the whole batch for a user's own model and loss, and what breaks it."""

from __future__ import annotations

import math
import os
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from autobatch.errors import NoGpuError, UsageError, WorkloadError
from autobatch.jsonform import to_json_form
from autobatch.plan import check_int, make_plan
from autobatch.snapshot import Snapshot
from autobatch.training.accumulator import Reduction
from autobatch.training.batches import batch_size
from autobatch.training.causes import Cause, find_causes
from autobatch.training.heldnoise import NoiseLedger
from autobatch.training.samples import tensors_of
from autobatch.training.twin import Count, LossFn, Twins, relative_difference

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autobatch.jsonform import JsonValue
    from autobatch.plan import Plan

__all__ = ["Cause", "EquivalenceReport", "check_equivalence"]

# Relative differences of what is equal but for rounding. The least is what a few hundred additions come to, the most what still
# is no error of weights; between them the tolerance follows what mere reordering of the samples changes.
_TOLERANCES = {"float64": (1e-10, 1e-5), "float32": (1e-5, 1e-3), "bfloat16": (2e-2, 1e-1), "float16": (5e-3, 5e-2)}
_ROUNDING_FACTOR = 20.0


@dataclass(frozen=True, kw_only=True)
class EquivalenceReport:
    """What came of running a batch whole and split."""

    equal: bool
    """Whether the gradients differ by no more than the tolerance, on this batch."""
    relative_difference: float
    """The largest of any parameter: ‖split − whole‖ / ‖whole‖, with ‖whole‖ at least a thousandth of the model's."""
    worst_parameter: str
    """The name of the parameter of that difference."""
    tolerance: float
    """What was taken for rounding."""
    dtype: str
    """What the comparison was computed in: `float64`, or the model's own, such as `float32`."""
    micro_batch_sizes: tuple[int, ...]
    """Samples of each micro-batch of the split run."""
    causes: tuple[Cause, ...] = ()
    """What breaks equality; empty where nothing does."""
    notes: tuple[str, ...] = ()
    """How the comparison was made where that is not plain, one line each."""

    def to_dict(self) -> dict[str, JsonValue]:
        """The JSON form."""
        form = to_json_form(self)
        assert isinstance(form, dict)  # noqa: S101 - a dataclass's form is an object; this says so to the type checker
        return form


def check_equivalence(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    *,
    plan: Plan | None = None,
    micro_batch_size: int | None = None,
    count: Count | None = None,
    loss_reduction: Reduction = "mean",
    tolerance: float | None = None,
) -> EquivalenceReport:
    """Run a model on a small batch, whole and accumulated, and compare the gradients.

    The batch runs on copies of the model, with the weights of an `Accumulator`: in float64, or, where the model or the loss
    cannot, in the model's own precision, with a tolerance for its rounding. Where gradients differ, things are changed one by
    one and run again until they do not, which names the causes. Random draws (dropout) are held for each sample, so that a
    sample's are the same in the whole batch and in its micro-batch.

    Nothing of the caller's is changed: the model's parameters, gradients, buffers and modes, random generators and process
    switches are as before. Only plain Python objects that the loss function itself changes are not put back. Host memory: the
    model once more; on its device twice, in float64.

    Args:
        model: the model as it trains, in its mode, not wrapped by DDP or FSDP.
        batch: at least 2 samples, as `Accumulator.step` takes them; few are enough, and unlike ones show most.
        loss_fn: `loss_fn(batch)` as for the accumulator, calling this very model, or `loss_fn(model, batch)`.
        plan: the plan to split by; its share of a rank bounds the batch.
        micro_batch_size: the largest micro-batch instead; about a third of the batch where neither is given.
        count, loss_reduction: as for the accumulator.
        tolerance: the relative difference up to which gradients are equal, above 0; by precision where None.

    Returns:
        Whether they are equal, by how much they differ, and why.

    Raises:
        UsageError: the batch cannot be split, or nothing could be learned from it (every gradient is zero).
        WorkloadError: the model or the loss function failed, or gave no finite gradient.
        NoGpuError: the model is on an emulated card, where every value is zero.

    Example:
        >>> import torch, autobatch
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> report = check_equivalence(model, (x, y), lambda batch: ((model(batch[0]) - batch[1]) ** 2).sum())
        >>> report.equal, report.causes[0].name
        (False, 'sum')
    """
    refuse_emulated(model, batch)
    samples = batch_size(batch)
    plan = _plan_of(samples, plan, micro_batch_size)
    if loss_reduction not in get_args(Reduction):
        raise UsageError(f"loss_reduction {loss_reduction!r} is unknown; choose {', '.join(get_args(Reduction))}")
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"tolerance {tolerance} is not above 0; leave it out to take the rounding's own")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("the model has 0 parameters that require gradients: 1 or more are needed to compare anything")
    snapshot = Snapshot.take([model])
    try:
        comparison = _Comparison(
            model, batch, loss_fn, plan=plan, reduction=loss_reduction, count=count, tolerance=tolerance
        )
        return comparison.report()
    finally:
        snapshot.restore()


def refuse_emulated(model: nn.Module, batch: Any) -> None:
    """Refuse what lies on an emulated card; raises `NoGpuError`."""
    path = os.environ.get("AUTOBATCH_EMULATED_GPU")
    if not path:
        return
    tensors = [*model.parameters(), *model.buffers(), *(tensor for _, _, tensor in tensors_of(batch))]
    if not any(tensor.is_cuda for tensor in tensors):
        return
    from autobatch.gpu.presence import find_presence

    name = next((card.name for card in find_presence().cards), "a GPU")
    raise NoGpuError(
        f"{name} is emulated: every value on it is zero, and equality of zeros proves nothing; check on the CPU or a real GPU"
    )


class _Comparison:
    """One check under way."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn,
        *,
        plan: Plan,
        reduction: Reduction,
        count: Count | None,
        tolerance: float | None,
    ) -> None:
        self._model, self._batch, self._reduction, self._count = model, batch, reduction, count
        self._asked_tolerance = tolerance
        self._notes: list[str] = []
        self._twins, self._dtype = self._first_run(loss_fn, plan)

    def _first_run(self, loss_fn: LossFn, plan: Plan) -> tuple[Twins, str]:
        """Run the whole batch once in float64, or else as the model is."""

        def twins_of(*, double: bool) -> Twins:
            twins = Twins(
                self._model,
                self._batch,
                loss_fn,
                plan=plan,
                reduction=self._reduction,
                count=self._count,
                double=double,
            )
            twins.whole()
            return twins

        try:
            return twins_of(double=True), "float64"
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 - the model may raise anything where it cannot run in float64
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        try:
            twins = twins_of(double=False)
        except UsageError:
            raise
        except Exception as error:
            raise WorkloadError(
                f"the model failed on the whole batch: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
                traceback_text="".join(traceback.format_exception(error)),
            ) from error
        dtype = _lowest_dtype(self._model)
        self._notes.append(f"compared in {dtype}, since it does not run in float64 ({reason})")
        return twins, dtype

    def report(self) -> EquivalenceReport:
        """Compare, and find the causes of a difference."""
        try:
            return self._compare()
        except (UsageError, WorkloadError):
            raise
        except Exception as error:
            raise WorkloadError(
                f"the model failed on a part of the batch: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
                traceback_text="".join(traceback.format_exception(error)),
            ) from error

    def _compare(self) -> EquivalenceReport:
        twins = self._twins
        whole = twins.whole()
        _check_gradients(whole)
        self._hold_noise(whole)
        if twins.noise is not None:
            whole = twins.whole()
        tolerance = self._tolerance(whole)
        difference, worst = relative_difference(twins.split(), whole)
        if not math.isfinite(difference):
            raise WorkloadError(f"the gradient of {worst} is not finite in a micro-batch: check samples and loss first")
        sizes = twins.micro_batch_sizes
        self._note_buffers()
        causes: tuple[Cause, ...] = ()
        if difference > tolerance:
            causes = find_causes(
                twins,
                self._batch,
                difference,
                tolerance=tolerance,
                reduction=self._reduction,
                has_count=self._count is not None,
            )
        return EquivalenceReport(
            equal=difference <= tolerance,
            relative_difference=difference,
            worst_parameter=worst,
            tolerance=tolerance,
            dtype=self._dtype,
            micro_batch_sizes=sizes,
            causes=causes,
            notes=tuple(self._notes),
        )

    def _hold_noise(self, whole: dict[str, torch.Tensor]) -> None:
        """See whether seeds matter, and hold what is drawn for each sample where they do."""
        least = _TOLERANCES[self._dtype][0]
        again, _ = relative_difference(self._twins.whole(), whole)
        if again > least:
            self._notes.append(
                f"not deterministic: two runs with the same seeds differ by {again:.1e}, which no comparison can fall below"
            )
        other, _ = relative_difference(self._twins.whole(seed=1), whole)
        if other > max(least, 4 * again):
            self._twins.noise = NoiseLedger(self._twins.samples)
            self._notes.append(
                f"stochastic (other seeds change gradients by {other:.1e}): compared with seeds held for each sample"
            )

    def _tolerance(self, whole: dict[str, torch.Tensor]) -> float:
        """Follow the rounding that the sum over reordered samples shows, within what rounding can be."""
        if self._asked_tolerance is not None:
            return self._asked_tolerance
        least, most = _TOLERANCES[self._dtype]
        if self._twins.noise is not None:
            return max(least, most if self._dtype != "float64" else least)
        turned, _ = relative_difference(self._twins.whole(rows=range(self._twins.samples - 1, -1, -1)), whole)
        if self._dtype == "float64" and 1e-12 < turned < most:
            self._notes.append(f"parts of the model compute below float64: reordered samples differ by {turned:.1e}")
        return min(max(least, _ROUNDING_FACTOR * turned), most)

    def _note_buffers(self) -> None:
        if self._twins.changed_buffers:
            names = self._twins.changed_buffers
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self._notes.append(
                f"buffers {', '.join(names[:3])}{more} change at each forward: {len(self._twins.micro_batch_sizes)} times a "
                "window when accumulated, once when whole"
            )


def _plan_of(samples: int, plan: Plan | None, micro_batch_size: int | None) -> Plan:
    if samples < 2:
        raise UsageError(f"the batch has {samples} sample, which cannot be split: give at least 2")
    if plan is not None and micro_batch_size is not None:
        raise UsageError(
            f"a plan (micro-batch {plan.micro_batch_size}) and micro_batch_size {micro_batch_size}: give one"
        )
    if plan is None:
        size = -(-samples // 3) if micro_batch_size is None else micro_batch_size
        check_int("micro_batch_size", size, 1)
        plan = make_plan(target=samples, max_micro_batch_size=size, split="balanced")
    if samples <= plan.micro_batch_size:
        raise UsageError(
            f"the batch of {samples} samples is one micro-batch of up to {plan.micro_batch_size}: nothing would be split; give "
            f"micro_batch_size {samples - 1} or less, or more samples"
        )
    return plan


def _check_gradients(whole: dict[str, torch.Tensor]) -> None:
    for name, gradient in whole.items():
        if not bool(gradient.isfinite().all()):
            raise WorkloadError(
                f"the gradient of {name} is not finite on the whole batch: check samples and loss first"
            )
    if not any(bool(gradient.any()) for gradient in whole.values()):
        raise UsageError(
            "every gradient is 0 on this batch, so that equality would prove nothing: does loss_fn run the model that was given?"
        )


def _lowest_dtype(model: nn.Module) -> str:
    """The coarsest floating point type of the model's parameters that is known here, else float32."""
    found = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return next((name for name in ("bfloat16", "float16", "float32", "float64") if name in found), "float32")
