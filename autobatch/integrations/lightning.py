"""`Trainer` of Lightning: a callback that sets the data's batch size and the accumulation steps once, before the first step."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from autobatch.errors import UsageError
from autobatch.integrations.largest import LargestSamples, largest_named
from autobatch.integrations.probed import (
    check_undecided,
    only_size,
    unchanged_attributes,
    with_warnings,
    writing_progress,
)
from autobatch.library import probe
from autobatch.training.randomness import unchanged_generators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from lightning.pytorch import LightningModule, Trainer

    from autobatch.probing import ProbeEvent
    from autobatch.report import Report

__all__ = ["BatchSizeTuner"]

_LOG = logging.getLogger(__name__)
_ANY_COMMAND = "probe the whole command instead: autobatch probe --target N -- python train.py …"


class BatchSizeTuner(Callback):  # type: ignore[misc]  # the framework is an extra: no types are taken from it
    """Finds the largest micro-batch that this trainer can train on, and sets its sizes for the target.

    Takes the place of Lightning's `BatchSizeFinder`, under DDP too. When `fit` begins, with the model on its device, wrapped and
    with its optimizer, it probes, and then sets the batch size of the data module (or of the model, where that makes the
    loaders) and the trainer's `accumulate_grad_batches`. Trials run the module's own `training_step` through the trainer's
    strategy, precision and gradient clipping, on batches made of the largest samples; no callback is called and nothing is
    logged. Model, optimizer, scaler and random generators are then put back bit for bit, the loaders are made with the new size,
    and `configure_optimizers` is called anew, so that a schedule that asks for `estimated_stepping_batches` gets the right
    number. `validate`, `test` and `predict` are left alone.

    Example:
        >>> tuner = BatchSizeTuner(target=256)  # doctest: +SKIP
        >>> Trainer(callbacks=[tuner]).fit(model, datamodule)  # doctest: +SKIP
        >>> tuner.report.plan.micro_batch_size, tuner.report.plan.accumulation_steps  # doctest: +SKIP
        (32, 8)
    """

    def __init__(
        self,
        *,
        target: int,
        batch_arg_name: str = "batch_size",
        largest: Sequence[Any] | None = None,
        looks: int | None = None,
        progress: Callable[[ProbeEvent], None] | None = None,
        **options: Any,
    ) -> None:
        """Prepare it.

        Args:
            target: samples per optimizer step, over all ranks.
            batch_arg_name: the attribute that holds the batch size, of the model, its `hparams` or the data module, which
                `train_dataloader` reads.
            largest: the samples that take the most memory, as the data set gives them, where they are known.
            looks: samples to look at, `LargestSamples.of_loader`'s default where None.
            progress: called with each event of the probe; where None, rank 0 writes lines to standard error.
            **options: further fields of `ProbeOptions` by name, such as `headroom="1GiB"`.

        Raises:
            UsageError: an option is the trainer's to decide.
        """
        super().__init__()
        check_undecided(options, ("device", "split", "world_size"), who="the trainer")
        self.report: Report | None = None
        """What was found; None until `fit` has begun."""
        self._target, self._batch_arg_name = target, batch_arg_name
        self._largest, self._looks = largest_named(largest), looks
        self._progress, self._options = progress, options

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe, and set the sizes.

        Raises:
            UsageError: the module optimizes by hand or has several optimizers, loaders were passed to `fit` directly, no
                attribute holds the batch size, or the strategy shards the model.
            NothingFitsError: not even the smallest size fits.
            WorkloadError: a training step failed, but not for want of device memory.
        """
        if trainer.fast_dev_run:
            return
        _check_trainer(trainer, pl_module, self._batch_arg_name)
        (optimizer,) = trainer.strategy.optimizers
        step = _TrainingStep(trainer, pl_module, optimizer)
        with (
            unchanged_generators(),
            writing_progress(self._progress, starting="probing the LightningModule …", wanted=True) as told,
            _undisturbed(trainer, pl_module),
        ):
            samples = LargestSamples.of_loader(_training_loader(trainer), largest=self._largest, looks=self._looks)
            options = {"dataset_size": samples.num_samples, **self._options}
            report = probe(
                lambda n: step(samples.batch(n)),
                optimizer=optimizer,
                target=self._target,
                restore=[trainer.strategy.model],
                scaler=getattr(trainer.strategy.precision_plugin, "scaler", None),
                end_window=step.end_window,
                workload=type(pl_module).__name__,
                progress=told,
                **options,
            )
        self.report = with_warnings(report, samples)
        with unchanged_generators():
            self._set_sizes(trainer)
        if trainer.ckpt_path is not None:
            _LOG.warning(
                "training goes on from a checkpoint: where that was saved in the middle of an epoch with other sizes, Lightning "
                "counts its batches as some of %d samples, and ends the epoch elsewhere",
                only_size(report)[0],
            )

    def _set_sizes(self, trainer: Trainer) -> None:
        from lightning.pytorch.utilities.parsing import lightning_setattr

        if self.report is None:
            return
        micro_batch_size, trainer.accumulate_grad_batches = only_size(self.report)
        lightning_setattr(trainer.lightning_module, self._batch_arg_name, micro_batch_size)
        loader = _training_loader(trainer)
        size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
        if size not in {micro_batch_size, None}:
            raise UsageError(
                f"train_dataloader() gives batches of {size} samples, and {self._batch_arg_name} is {micro_batch_size} now: let "
                f"it make the loader anew, with {self._batch_arg_name} as its batch size, each time it is called"
            )
        # Loaders that exist have the old size; they are made anew when they are next asked for.
        trainer.fit_loop._combined_loader = None  # noqa: SLF001 - as BatchSizeFinder does it
        trainer.fit_loop.epoch_loop.val_loop._combined_loader = None  # noqa: SLF001
        # A schedule may have been made for the old number of steps. A checkpoint's state is loaded after this.
        trainer.strategy.setup_optimizers(trainer)


def _check_trainer(trainer: Trainer, module: LightningModule, batch_arg_name: str) -> None:
    """Refuse what cannot be measured here, or whose batch size cannot be set."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities.parsing import lightning_hasattr

    name = type(module).__name__
    strategy = type(trainer.strategy).__name__
    # DeepSpeed's strategy is a DDPStrategy too, and steps by an engine of its own.
    if (
        not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        or trainer.strategy.handles_gradient_accumulation
    ):
        raise UsageError(
            f"{strategy} is neither one device nor DDP, and cannot be put back after a trial: {_ANY_COMMAND}"
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        raise UsageError(
            "GradientAccumulationScheduler changes the steps, and with them the effective batch size: leave it out"
        )
    if not module.automatic_optimization:
        raise UsageError(f"{name} optimizes by hand, so a step of it is no micro-batch: {_ANY_COMMAND}")
    if len(trainer.strategy.optimizers) != 1:
        raise UsageError(f"{name} has {len(trainer.strategy.optimizers)} optimizers, and one is needed: {_ANY_COMMAND}")
    if not trainer.fit_loop._data_source.is_module():  # noqa: SLF001 - as BatchSizeFinder does it
        raise UsageError(
            "loaders were passed to fit directly, and their batch size cannot be set: make them in train_dataloader() of the "
            "model or of a LightningDataModule"
        )
    if not lightning_hasattr(module, batch_arg_name):
        raise UsageError(
            f"neither {name}, nor its hparams, nor the data module has {batch_arg_name}, which train_dataloader() would read: "
            "add it, or name another by batch_arg_name"
        )


def _training_loader(trainer: Trainer) -> Any:
    from torch.utils.data import DataLoader

    loader = trainer.fit_loop._data_source.dataloader()  # noqa: SLF001 - as the fit loop asks for it
    if not isinstance(loader, DataLoader):
        raise UsageError(
            f"train_dataloader() gives a {type(loader).__name__}, and one torch DataLoader is needed: {_ANY_COMMAND}"
        )
    return loader


class _TrainingStep:
    """A micro-step as the fit loop runs it, and the end of a window."""

    def __init__(self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._trainer, self._module, self._optimizer = trainer, module, optimizer
        self._loss: torch.Tensor | None = None
        self._takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def __call__(self, batch: Any) -> None:
        strategy, module = self._trainer.strategy, self._module
        # As the epoch's loop does it; the hooks are the module's or the data module's.
        batch = module._on_before_batch_transfer(strategy.precision_plugin.convert_input(batch), dataloader_idx=0)  # noqa: SLF001
        batch = strategy.batch_to_device(batch, dataloader_idx=0)
        output = strategy.training_step(*((batch, 0) if self._takes_index else (batch,)))
        loss = output["loss"] if isinstance(output, dict) else output
        if loss is None:
            raise UsageError(
                "training_step returned no loss for the largest batch: it skips it, and would never train on it"
            )
        strategy.backward(loss / 2, self._optimizer)
        self._loss = loss.detach()

    def end_window(self) -> None:
        """Clip and step through the strategy, as the fit loop does, and zero."""
        # Under fp16 a closure that returns None stands for a step that was skipped.
        self._trainer.strategy.optimizer_step(self._optimizer, lambda: self._loss)
        self._optimizer.zero_grad()


@contextlib.contextmanager
def _undisturbed(trainer: Any, module: Any) -> Iterator[None]:
    """Begin training as far as the module itself hears of it, with callbacks and loggers kept out, and undo that."""
    from lightning.pytorch.loggers.logger import DummyLogger

    with unchanged_attributes(module, trainer):
        trainer.callbacks = []
        trainer._loggers = [DummyLogger() for _ in trainer.loggers]  # noqa: SLF001 - where the property of that name keeps them
        vars(module).update({"log": _nothing, "log_dict": _nothing})
        # What a module makes for its steps it makes in these, which come later than this callback's.
        for hook in ("on_fit_start", "on_train_start", "on_train_epoch_start"):
            getattr(module, hook)()
        module.train()
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """Log nothing: the loop that keeps what is logged has not begun."""
