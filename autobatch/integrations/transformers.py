"""`Trainer` of transformers: its batch sizes set once, before it trains.

The schedule's length, evaluation steps given as a share, logging and resuming are worked out by `Trainer.train` from the sizes
that stand in its arguments when it begins; so they are right where the sizes are set before, and stay so, since nothing changes
them later.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.errors import NothingFitsError, UsageError
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
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    import transformers
    from accelerate.optimizer import AcceleratedOptimizer

    from autobatch.probing import ProbeEvent
    from autobatch.report import Report

__all__ = ["tune", "tune_evaluation"]

_DECIDED = ("device", "split", "world_size")
_STEPS_UNKNOWN = 1000  # of a schedule that no trial follows
_ANY_COMMAND = "probe the whole command instead: autobatch probe --target N -- python train.py …"


def tune(
    trainer: transformers.Trainer,
    *,
    target: int,
    largest: Sequence[Any] | None = None,
    looks: int | None = None,
    progress: Callable[[ProbeEvent], None] | None = None,
    **options: Any,
) -> Report:
    """Find the largest micro-batch that this trainer can train on, and set its sizes for the target.

    Sets `per_device_train_batch_size` and `gradient_accumulation_steps` of `trainer.args`. Trials run the trainer's own
    `training_step` on its own model as `accelerate` wraps it, with its own optimizer, its clipping, its precision, its collator
    and its loss, weighted by tokens as the trainer does it; a subclass's `compute_loss` is what runs. Batches are made of the
    largest samples of the training set. Afterwards the model, the generators of random numbers and an optimizer that was given
    are as before, bit for bit, and so are the trainer's own attributes; an optimizer that the trainer makes itself it makes anew.
    No callback is called, and what a `compute_loss` logs is dropped.

    Under `torchrun` every rank calls it alike, and DDP is measured as it trains.

    Args:
        trainer: made, and not yet trained.
        target: samples per optimizer step, over all ranks.
        largest: the samples that take the most memory, as the data set gives them, where they are known; else they are
            looked for.
        looks: samples to look at, `LargestSamples.of_loader`'s default where None.
        progress: called with each event of the probe; where None, rank 0 writes lines to standard error unless
            `args.disable_tqdm`.
        **options: further fields of `ProbeOptions` by name, such as `headroom="1GiB"`.

    Returns:
        The report; its plan is what was set.

    Raises:
        UsageError: the trainer has no training set, splits batches by `DataParallel`, is sharded (FSDP, DeepSpeed, tensor or
            context parallel), or would change its batch size while it trains (`auto_find_batch_size`).
        NothingFitsError: not even the smallest size fits.
        WorkloadError: a training step failed, but not for want of device memory.

    Example:
        >>> report = tune(trainer, target=256)  # doctest: +SKIP
        >>> trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps  # doctest: +SKIP
        (32, 8)
        >>> trainer.train()  # doctest: +SKIP
    """
    check_undecided(options, _DECIDED, who="the trainer")
    _check_trainer(trainer)
    if trainer.train_dataset is None:
        raise UsageError("the trainer has no train_dataset: batches are made of its largest samples")
    named = largest_named(largest)

    def find(prepared: _Prepared, told: Callable[[ProbeEvent], None] | None) -> Report:
        samples = LargestSamples.of_loader(trainer.get_train_dataloader(), largest=named, looks=looks)
        report = probe(
            lambda n: prepared.train_on(samples.batch(n)),
            optimizer=prepared.optimizer.optimizer,
            target=target,
            restore=[prepared.model],
            scaler=trainer.accelerator.scaler,
            end_window=prepared.end_window,
            workload=f"{type(trainer).__name__} of {type(trainer.model).__name__}",
            progress=told,
            **{"dataset_size": samples.num_samples, **options},
        )
        return with_warnings(report, samples)

    report = _probed_inside(trainer, find, progress)
    trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps = only_size(report)
    # What `train` begins with; it is read from the arguments when the trainer is made.
    trainer._train_batch_size = trainer.args.train_batch_size  # noqa: SLF001
    return report


def tune_evaluation(
    trainer: transformers.Trainer,
    *,
    largest: Sequence[Any] | None = None,
    looks: int | None = None,
    progress: Callable[[ProbeEvent], None] | None = None,
    **options: Any,
) -> Report:
    """Find the largest batch that this trainer can evaluate on while it trains, and set it; training keeps its sizes.

    Sets `per_device_eval_batch_size` of `trainer.args`, after `tune` or with the sizes that stand there. Each trial trains as the
    arguments say and evaluates after each optimizer step, so that what training holds (weights, optimizer state, what the
    allocator keeps) is there. Where predictions are gathered for `compute_metrics`, they lie on the device until
    `eval_accumulation_steps` are over, and are joined there, which takes as much again: both is counted.

    Args:
        trainer: as for `tune`; with an `eval_dataset`. Of several, the samples that take the most memory are those of all.
        largest: the samples that take the most memory, as the data set gives them, where they are known.
        looks: samples to look at in each data set, `LargestSamples.of_loader`'s default where None.
        progress: as for `tune`.
        **options: further fields of `ProbeOptions` by name, such as `max_micro_batch=64`; the target is the evaluation set.

    Returns:
        The report; `report.max_micro_batch_size` is what was set.

    Raises:
        UsageError: as `tune`, or there is no evaluation set.
        NothingFitsError: evaluation has no room beside training, whatever its batch; where predictions take it, how much.
        WorkloadError: a step failed, but not for want of device memory.
    """
    check_undecided(options, (*_DECIDED, "target", "objective", "tolerance", "dataset_size"), who="the trainer")
    _check_trainer(trainer)
    if trainer.eval_dataset is None:
        raise UsageError("the trainer has no eval_dataset: give it one, or leave tune_evaluation out")
    named = largest_named(largest)

    def find(prepared: _Prepared, told: Callable[[ProbeEvent], None] | None) -> Report:
        evaluations = _evaluations(trainer)
        found = [LargestSamples.of_loader(each.loader, largest=named, looks=looks) for each in evaluations]
        evaluated, evaluation = max(zip(found, evaluations, strict=True), key=lambda pair: pair[0].elements)
        num_samples = max((samples.num_samples or samples.num_looked_at) for samples in found)
        trained = LargestSamples.of_loader(trainer.get_train_dataloader(), looks=looks)
        training_size = trainer.args.per_device_train_batch_size
        sizes = [0]

        def micro_step(n: int) -> None:
            sizes[0] = n
            prepared.train_on(trained.batch(training_size))

        def end_window() -> None:
            prepared.end_window()
            prepared.evaluate_on(evaluated.batch(sizes[0]), evaluation, sizes[0], num_samples)

        with _naming_predictions(prepared):
            report = probe(
                micro_step,
                optimizer=prepared.optimizer.optimizer,
                target=max(num_samples, trainer.args.world_size),
                split="balanced",
                restore=[prepared.model],
                scaler=trainer.accelerator.scaler,
                end_window=end_window,
                workload=f"evaluation by {type(trainer).__name__} of {type(trainer.model).__name__}",
                progress=told,
                **options,
            )
        return with_warnings(report, evaluated)

    report = _probed_inside(trainer, find, progress)
    trainer.args.per_device_eval_batch_size = report.max_micro_batch_size or 1
    return report


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """What the trainer's `evaluate` hands to its loop for one data set."""

    loader: Any
    only_loss: bool
    ignore_keys: Any


def _evaluations(trainer: Any) -> list[_Evaluation]:
    """Let `evaluate` run up to its loop, for each data set: a subclass says there how it generates."""
    from transformers.trainer_utils import EvalLoopOutput

    found: list[_Evaluation] = []

    def loop(
        dataloader: Any, *_: Any, prediction_loss_only: bool | None = None, ignore_keys: Any = None, **__: Any
    ) -> Any:
        only_loss = trainer.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        found.append(_Evaluation(loader=dataloader, only_loss=bool(only_loss), ignore_keys=ignore_keys))
        return EvalLoopOutput(predictions=None, label_ids=None, metrics={}, num_samples=1)

    trainer.evaluation_loop = loop
    try:
        trainer.evaluate()
    finally:
        del trainer.evaluation_loop
    return found


def _check_trainer(trainer: transformers.Trainer) -> None:
    """Refuse what cannot be measured here, or would not train as it was measured."""
    args = trainer.args
    if args.n_gpu > 1:
        raise UsageError(
            f"the Trainer would split each batch over {args.n_gpu} GPUs by DataParallel: start it with torchrun, or show it one "
            "GPU by CUDA_VISIBLE_DEVICES=0"
        )
    if args.auto_find_batch_size:
        raise UsageError(
            "auto_find_batch_size halves the batch after an out-of-memory error, and with it the effective batch size: leave "
            "it out, the size set here was tried"
        )
    if trainer.is_in_train:
        raise UsageError("the trainer is training: set its sizes before train()")
    if args.world_size > 1 and getattr(trainer.accelerator, "split_batches", False):
        raise UsageError(
            f"split_batches=True divides each batch among {args.world_size} ranks, and the sizes set here are those of a rank: "
            "leave it out"
        )
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    sharded = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "TP": "tensor parallelism"}.get(
        kind
    )
    if sharded is None and getattr(trainer.accelerator, "parallelism_config", None) is not None:
        sharded = "a parallelism_config"
    if sharded is not None:
        raise UsageError(
            f"the trainer shards its model by {sharded}, which cannot be undone after a trial: {_ANY_COMMAND}"
        )


class _Prepared:
    """A trainer's model and optimizer as they are while it trains."""

    def __init__(self, trainer: transformers.Trainer, model: torch.nn.Module, optimizer: AcceleratedOptimizer) -> None:
        self._trainer, self.model, self.optimizer = trainer, model, optimizer
        self.predictions_bytes = 0
        """What gathered predictions, and what they are joined to, take of the device."""

    def train_on(self, batch: Mapping[str, Any]) -> None:
        """Run one micro-step as the trainer's loop does."""
        trainer = self._trainer
        batches, num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        trainer.training_step(self.model, batches[0], num_items)

    def end_window(self) -> None:
        """Clip, step and zero as the trainer's loop does."""
        args = self._trainer.args
        if args.max_grad_norm is not None and args.max_grad_norm > 0:
            self._trainer.accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()

    def evaluate_on(self, batch: Mapping[str, Any], evaluation: _Evaluation, size: int, num_samples: int) -> None:
        """Evaluate one batch as the trainer's loop does, beside what it holds when it has seen all."""
        trainer, args = self._trainer, self._trainer.args
        self.model.eval()
        _, logits, labels = trainer.prediction_step(
            self.model, batch, evaluation.only_loss, ignore_keys=evaluation.ignore_keys
        )
        if logits is None:
            return
        if trainer.preprocess_logits_for_metrics is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, labels)
        if args.batch_eval_metrics:
            return
        held = (
            num_samples
            if args.eval_accumulation_steps is None
            else args.eval_accumulation_steps * size * args.world_size
        )
        per_sample = -(-(_bytes_of(logits) + _bytes_of(labels)) // size)
        self.predictions_bytes = 2 * per_sample * min(held, num_samples)
        _hold(self.predictions_bytes, args.device)


def _bytes_of(value: Any) -> int:
    """Bytes of all tensors in something nested."""
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes_of, value))
    return value.numel() * value.element_size() if hasattr(value, "element_size") else 0


def _hold(num_bytes: int, device: torch.device) -> None:
    """Take memory for a moment."""
    import torch

    held = [torch.empty(num_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2)]
    del held


@contextlib.contextmanager
def _naming_predictions(prepared: _Prepared) -> Iterator[None]:
    """Say what gathered predictions take, where nothing fits beside them."""
    try:
        yield
    except NothingFitsError as error:
        if not prepared.predictions_bytes:
            raise
        raise NothingFitsError(
            f"{error}; predictions gathered for compute_metrics take {format_bytes(prepared.predictions_bytes)} of it: set "
            "eval_accumulation_steps, preprocess_logits_for_metrics or batch_eval_metrics",
            trials=error.trials,
        ) from None


def _probed_inside(
    trainer: Any,
    find: Callable[[_Prepared, Callable[[ProbeEvent], None] | None], Report],
    progress: Callable[[ProbeEvent], None] | None,
) -> Report:
    """Probe where `train` would begin its loop: after all that it does to the model before.

    So gradient checkpointing, noise on embeddings, fused kernels and the like are there as they will be. The trainer, its
    model's own attributes and its accelerator are afterwards as before; nobody hears of it.
    """
    reports: list[Report] = []

    def loop(*_: Any, **__: Any) -> None:
        with (
            writing_progress(progress, starting="probing the Trainer …", wanted=not trainer.args.disable_tqdm) as told,
            _prepared(trainer) as prepared,
        ):
            reports.append(find(prepared, told))

    args = trainer.args
    with (
        unchanged_generators(),
        unchanged_attributes(trainer, trainer.callback_handler, trainer.accelerator.gradient_state),
        unchanged_attributes(trainer.model),
    ):
        hook_before = getattr(trainer, "neftune_hook_handle", None)
        trainer.state = copy.copy(trainer.state)
        trainer.state.log_history = []
        trainer.state.max_steps = args.max_steps if args.max_steps > 0 else _STEPS_UNKNOWN
        trainer.callback_handler.callbacks = []
        trainer._inner_training_loop = loop  # noqa: SLF001 - the one place between what `train` prepares and its loop
        try:
            trainer.train()
        finally:
            hook = getattr(trainer, "neftune_hook_handle", None)
            if hook is not None and hook is not hook_before:
                hook.remove()
    trainer.model.zero_grad(set_to_none=True)
    return reports[0]


@contextlib.contextmanager
def _prepared(trainer: Any) -> Iterator[_Prepared]:
    """Make the trainer's optimizer and wrap its model as its loop does; let go of both at the end."""
    accelerator = trainer.accelerator
    accelerator.free_memory()
    try:
        trainer.create_optimizer()
        model, trainer.optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = model
        trainer.create_scheduler(num_training_steps=trainer.state.max_steps)
        trainer.current_gradient_accumulation_steps = 2
        yield _Prepared(trainer, model, trainer.optimizer)
    finally:
        accelerator.free_memory()
