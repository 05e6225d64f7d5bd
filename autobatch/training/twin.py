"""Runs of a model's copy: gradients of a batch, whole or accumulated, that leave the model itself alone."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError
from autobatch.training.accumulator import Accumulator, Reduction
from autobatch.training.batches import batch_size
from autobatch.training.samples import as_double, take_samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from autobatch.plan import Plan
    from autobatch.training.heldnoise import NoiseLedger

__all__ = ["Count", "Edits", "LossFn", "Twins", "relative_difference"]

LossFn = Callable[..., "torch.Tensor"]
Count = Callable[[Any], "float | torch.Tensor"]

# A parameter whose gradient is nothing but rounding (a bias before a normalization) is measured by the whole gradient.
_SMALLEST_SHARE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What is changed about a run, to see whether it matters."""

    frozen_statistics: bool = False
    """Modules that take statistics over the batch use the running ones."""
    kept_buffers: bool = False
    """Buffers are put back before every micro-batch."""
    without_noise: bool = False
    """All modules are in eval mode."""
    reduction: Reduction | None = None
    """Instead of the caller's."""
    count: Count | None = None
    """Instead of the caller's."""


class Twins:
    """Makes copies of a model and runs them; every run starts from the same parameters, buffers and seeds."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn,
        *,
        plan: Plan,
        reduction: Reduction,
        count: Count | None,
        double: bool,
    ) -> None:
        """Copy the model, once, in float64 where `double`."""
        self._model, self._plan = model, plan
        self._loss_fn, self._takes_model = loss_fn, takes_model(loss_fn)
        self._reduction, self._count = reduction, count
        self._start = _copied(model).double() if double else _copied(model)
        self._batch = as_double(batch) if double else batch
        self.samples = batch_size(batch)
        self.noise: NoiseLedger | None = None
        self.changed_buffers: tuple[str, ...] = ()
        self.micro_batch_sizes: tuple[int, ...] = ()
        self.loss = 0.0

    # ---- runs -------------------------------------------------------------------------------------------------------

    def whole(
        self, edits: Edits | None = None, *, rows: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """The gradients of one backward over the batch, or over these of its samples."""
        batch = take_samples(self._batch, range(self.samples) if rows is None else rows)
        with self._copy(edits or Edits(), seed) as twin, self._held(rows):
            loss = self.call(twin, batch)
            _check_scalar(loss)
            loss.backward()
            self.loss = float(loss.detach())
            if rows is None and (edits is None or edits == Edits()):
                self._note_buffers(twin)
            return {name: _gradient(parameter) for name, parameter in _trainable(twin)}

    def split(self, edits: Edits | None = None, *, seed: int = 0) -> dict[str, torch.Tensor]:
        """The gradients that an `Accumulator` steps with, over the same batch."""
        import torch

        edits = edits or Edits()
        with self._copy(edits, seed) as twin:
            named = dict(_trainable(twin))
            optimizer = torch.optim.SGD(named.values(), lr=0.0)
            gradients: dict[str, torch.Tensor] = {}

            def keep(*_: object) -> None:
                gradients.update({name: _gradient(parameter) for name, parameter in named.items()})

            optimizer.register_step_pre_hook(keep)
            accumulator = Accumulator(
                self._plan,
                model=twin,
                optimizer=optimizer,
                loss_reduction=edits.reduction or self._reduction,
                count=None if edits.reduction == "sum" else edits.count or self._count,
                on_oom="raise",
            )
            with self._held([]):
                result = accumulator.step(
                    take_samples(self._batch, range(self.samples)), _MicroBatches(self, twin, edits, seed)
                )
            self.micro_batch_sizes = result.micro_batch_sizes
        return gradients

    def call(self, twin: nn.Module, batch: Any) -> torch.Tensor:
        """The loss function as it is written, on a copy."""
        return self._loss_fn(twin, batch) if self._takes_model else self._loss_fn(batch)

    def _held(self, rows: Sequence[int] | None) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.noise is None else self.noise.holding(rows)

    @contextlib.contextmanager
    def _copy(self, edits: Edits, seed: int) -> Iterator[nn.Module]:
        import torch

        twin = _copied(self._start)
        if edits.without_noise:
            twin.eval()
        if edits.frozen_statistics:
            for module in self.statistics_modules(twin).values():
                _freeze(module)
        seed_all(seed)
        # Around the backward too: what is checkpointed is computed again there.
        standing_in = contextlib.nullcontext() if self._takes_model else _standing_in(self._model, twin)
        with torch.enable_grad(), standing_in:
            yield twin

    # ---- what the model has -----------------------------------------------------------------------------------------

    def statistics_modules(self, model: nn.Module | None = None) -> dict[str, nn.Module]:
        """Modules in training mode that normalize over the batch, or whose own buffers a forward changed."""
        from torch.nn.modules.batchnorm import _BatchNorm

        owners = {name.rpartition(".")[0] for name in self.changed_buffers}
        return {
            name: module
            for name, module in (model or self._start).named_modules()
            if module.training and (isinstance(module, _BatchNorm) or name in owners)
        }

    def _note_buffers(self, twin: nn.Module) -> None:
        import torch

        before = dict(self._start.named_buffers())
        self.changed_buffers = tuple(
            name for name, buffer in twin.named_buffers() if name not in before or not torch.equal(buffer, before[name])
        )


class _MicroBatches:
    """The loss of each micro-batch in turn, with what is held for it."""

    def __init__(self, twins: Twins, twin: nn.Module, edits: Edits, seed: int) -> None:
        self._twins, self._twin, self._edits, self._seed = twins, twin, edits, seed
        self._first = 0
        self._buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}

    def __call__(self, batch: Any) -> torch.Tensor:
        size = batch_size(batch)
        rows = list(range(self._first, self._first + size))
        self._first += size
        if self._edits.kept_buffers:
            self._put_back()
        if self._twins.noise is not None:
            # Every micro-batch draws from the start; which values are its own is told by its samples.
            self._twins.noise.rows = rows
            seed_all(self._seed)
        return self._twins.call(self._twin, batch)

    def _put_back(self) -> None:
        import torch

        with torch.no_grad():
            for name, buffer in self._twin.named_buffers():
                buffer.copy_(self._buffers[name])


def relative_difference(ours: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of a parameter's gradients, relative to it, and the parameter's name.

    ‖ours − whole‖ / ‖whole‖ for each parameter; a gradient below a thousandth of the whole model's counts as that much.
    """
    floor = _SMALLEST_SHARE * sum(float(gradient.norm()) ** 2 for gradient in whole.values()) ** 0.5
    worst, worst_name = 0.0, next(iter(whole), "")
    for name, gradient in whole.items():
        distance = float((ours[name] - gradient).norm())
        scale = max(float(gradient.norm()), floor) or distance
        if distance and distance / scale > worst:
            worst, worst_name = distance / scale, name
    return worst, worst_name


def takes_model(loss_fn: LossFn) -> bool:
    """Whether it is `loss_fn(model, batch)`, rather than `loss_fn(batch)`."""
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):
        return False
    wanted = [one for one in parameters if one.kind in {one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD}]
    return len([one for one in wanted if one.default is one.empty]) >= 2


def seed_all(seed: int) -> None:
    """Seed every generator that training draws from; none of a card that is not in use yet."""
    import torch

    random.seed(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(seed)
    torch.default_generator.manual_seed(seed)
    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    if is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def _standing_in(model: nn.Module, twin: nn.Module) -> Iterator[None]:
    """Let every module of the model be its twin's: a loss function that names the model itself then runs the copy."""
    pairs = list(zip(model.modules(), twin.modules(), strict=True))
    kept = [(module, module.__dict__) for module, _ in pairs]
    try:
        for module, other in pairs:
            object.__setattr__(module, "__dict__", other.__dict__)
        yield
    finally:
        for module, attributes in kept:
            object.__setattr__(module, "__dict__", attributes)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a copy may call any code of the model's
        raise UsageError(
            f"the model cannot be copied ({type(error).__name__}: {str(error).partition(chr(10))[0]}): check it before its first "
            "forward, without hooks and wrappers"
        ) from error


def _freeze(module: nn.Module) -> None:
    import torch

    module.eval()
    # Without running statistics it takes the batch's in eval mode too.
    norm: Any = module
    if getattr(norm, "num_features", None) is None or norm.running_mean is not None:
        return
    like = {} if norm.weight is None else {"dtype": norm.weight.dtype, "device": norm.weight.device}
    norm.running_mean, norm.running_var = torch.zeros(norm.num_features, **like), torch.ones(norm.num_features, **like)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    import torch

    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().clone()


def _check_scalar(loss: object) -> None:
    import torch

    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise UsageError(
            f"loss_fn returned {type(loss).__name__}: return the loss of the batch, one number with its graph through the model"
        )
