"""A loop on `accelerate`: its accumulation steps set for the target, measured on what `prepare` returned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError
from autobatch.integrations.probed import check_undecided, only_size, writing_progress
from autobatch.library import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from autobatch.probing import ProbeEvent
    from autobatch.report import Report

__all__ = ["tune"]


def tune(
    accelerator: Accelerator,
    loss_of: Callable[[int], torch.Tensor],
    *,
    model: torch.nn.Module,
    optimizer: AcceleratedOptimizer,
    target: int,
    max_grad_norm: float | None = None,
    restore: Sequence[object] = (),
    progress: Callable[[ProbeEvent], None] | None = None,
    **options: Any,
) -> Report:
    """Find the largest micro-batch that trains under this accelerator, and set its accumulation steps for the target.

    Sets `accelerator.gradient_accumulation_steps`; the loader is made afterwards, with `report.plan.micro_batch_size` samples a
    process (with `split_batches=True` that times `accelerator.num_processes`). Each micro-batch goes through
    `accelerator.backward`, each window ends in `optimizer.step` and `zero_grad`, with the accelerator's precision and scaler.
    Everything named is put back bit for bit, and the random generators too.

    Args:
        accelerator: which prepared the model and the optimizer.
        loss_of: called with n; builds the *largest* batch of n samples that training will see and returns the loss of the
            prepared model on it, without a backward pass.
        model: as `accelerator.prepare` returned it.
        optimizer: as `accelerator.prepare` returned it.
        target: samples per optimizer step, over all processes.
        max_grad_norm: by which the loop clips, where it does.
        restore: what else `loss_of` changes, such as a second model.
        progress: called with each event of the probe; where None, the main process writes lines to standard error.
        **options: further fields of `ProbeOptions` by name, such as `headroom="1GiB"`.

    Returns:
        The report.

    Raises:
        UsageError: the optimizer was not prepared, or DeepSpeed or Megatron steps in its place.
        NothingFitsError: not even the smallest size fits.
        WorkloadError: `loss_of` failed, but not for want of device memory.

    Example:
        >>> model, optimizer = accelerator.prepare(model, optimizer)  # doctest: +SKIP
        >>> report = tune(accelerator, loss_of, model=model, optimizer=optimizer, target=256)  # doctest: +SKIP
        >>> loader = accelerator.prepare(DataLoader(data, batch_size=report.plan.micro_batch_size))  # doctest: +SKIP
    """
    check_undecided(options, ("split", "world_size"), who="the accelerator")
    _check(accelerator, optimizer)

    def micro_step(n: int) -> None:
        import torch

        loss = loss_of(n)
        if not isinstance(loss, torch.Tensor):
            raise UsageError(
                f"loss_of returned {type(loss).__name__}: return the loss, and leave its backward to autobatch"
            )
        accelerator.backward(loss)

    def end_window() -> None:
        if max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    with writing_progress(progress, starting="probing under accelerate …", wanted=True) as told:
        report = probe(
            micro_step,
            optimizer=optimizer.optimizer,
            target=target,
            restore=[model, *restore],
            scaler=accelerator.scaler,
            end_window=end_window,
            workload=type(accelerator.unwrap_model(model)).__name__,
            progress=told,
            **options,
        )
    _, accelerator.gradient_accumulation_steps = only_size(report)
    return report


def _check(accelerator: Accelerator, optimizer: object) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in {"DEEPSPEED", "MEGATRON_LM"}:
        raise UsageError(
            f"under {kind} an engine of its own steps, which cannot be put back after a trial: probe the whole command instead: "
            "autobatch probe --target N -- accelerate launch train.py …"
        )
    if not accelerator.sync_gradients:
        raise UsageError("a window of accumulate() is open, in which the optimizer does not step: tune before the loop")
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise UsageError(
            f"optimizer is a {type(optimizer).__name__}: pass what accelerator.prepare returned, and the model too"
        )
