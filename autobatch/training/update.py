"""One update of the parameters at the end of a window: unscale, clip, step, schedule, clear."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

from autobatch.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

    Scheduler = LRScheduler | ReduceLROnPlateau

__all__ = ["Update"]


class Update:
    """Optimizers, their schedulers and the GradScaler, stepped together."""

    def __init__(
        self,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        schedulers: Scheduler | Sequence[Scheduler] | None,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
    ) -> None:
        """Take the parts, as `Accumulator` does.

        Raises:
            UsageError: there is no optimizer, a parameter is in two of them, or the norm is not above 0.
        """
        self._optimizers = tuple(optimizers) if isinstance(optimizers, Sequence) else (optimizers,)
        for optimizer in self._optimizers:
            if not callable(getattr(optimizer, "step", None)) or not hasattr(optimizer, "param_groups"):
                raise UsageError(
                    f"optimizer is of type {type(optimizer).__name__}: give a torch.optim.Optimizer, or several"
                )
        self._schedulers = (
            () if schedulers is None else tuple(schedulers) if isinstance(schedulers, Sequence) else (schedulers,)
        )
        self._scaler, self._max_grad_norm = scaler, max_grad_norm
        self.is_accumulating = False
        """Whether a window is open, in which nobody may step."""
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise UsageError(f"max_grad_norm {max_grad_norm} is not above 0; leave it out to clip nothing")
        if not self._optimizers:
            raise UsageError("no optimizer was given: give one, or several")
        parameters = self.parameters()
        twice = len(parameters) - len(set(map(id, parameters)))
        if twice:
            raise UsageError(f"{twice} parameters belong to two optimizers: a window would step them twice")
        for optimizer in self._optimizers:
            optimizer.register_step_pre_hook(functools.partial(_refuse, weakref.ref(self)))

    def parameters(self) -> list[torch.Tensor]:
        """Read anew each time: groups are added where layers are thawed."""
        return [
            value for optimizer in self._optimizers for group in optimizer.param_groups for value in group["params"]
        ]

    def check_trains(self, model: nn.Module) -> None:
        """Refuse optimizers of another model.

        Raises:
            UsageError: none of their parameters is the model's.
        """
        own = set(map(id, model.parameters()))
        if own and not any(id(value) in own for value in self.parameters()):
            raise UsageError("no parameter of the optimizer is the model's: it would train another model")

    def holds_gradients(self) -> bool:
        """Whether any parameter has a gradient."""
        return any(value.grad is not None for value in self.parameters())

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that are held."""
        return [value.grad for value in self.parameters() if value.grad is not None]

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as its backward takes it."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def zero(self) -> None:
        """Clear every gradient."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def clip(self) -> torch.Tensor | None:
        """Clip gradients to the norm asked for, unscaled; returns their norm before it, None where nothing is clipped."""
        import torch

        if self._max_grad_norm is None:
            return None
        if self._scaler is not None and self.holds_gradients():
            for optimizer in self._optimizers:
                self._scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self._max_grad_norm)
        # Of sharded parameters each rank has a part of the norm until it is asked for the whole.
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self) -> bool:
        """Step optimizers and schedulers, and clear gradients; returns False where no step was made."""
        self.is_accumulating = False
        try:
            stepped = self.holds_gradients() and self._step_optimizers()
        finally:
            self.zero()
        if stepped:
            for scheduler in self._schedulers:
                if not _is_plateau(scheduler):
                    scheduler.step()
        return stepped

    def step_plateaus(self, metric: float | torch.Tensor) -> None:
        """Step each `ReduceLROnPlateau`.

        Raises:
            UsageError: there is none.
        """
        plateaus = [scheduler for scheduler in self._schedulers if _is_plateau(scheduler)]
        if not plateaus:
            kinds = ", ".join(type(scheduler).__name__ for scheduler in self._schedulers) or "none"
            raise UsageError(
                f"the scheduler is {kinds}, which takes no metric: step_plateau is for ReduceLROnPlateau alone"
            )
        for scheduler in plateaus:
            scheduler.step(metric)

    def _step_optimizers(self) -> bool:
        if self._scaler is None:
            for optimizer in self._optimizers:
                optimizer.step()
            return True
        for optimizer in self._optimizers:
            # Without a gradient the scaler has checked none for infinities, and refuses to step.
            if any(value.grad is not None for group in optimizer.param_groups for value in group["params"]):
                self._scaler.step(optimizer)
        before = self._scaler.get_scale()
        self._scaler.update()
        # The scale falls where a step was skipped, and only there (torch.amp.GradScaler.update's documentation).
        return self._scaler.get_scale() >= before


def _refuse(reference: weakref.ref[Update], *_: object) -> None:
    """Stop a step inside of a window, left over from a loop that stepped by itself."""
    update = reference()
    if update is not None and update.is_accumulating:
        raise UsageError(
            "the loop steps the optimizer inside of a window: take optimizer.step() out, the accumulator does it"
        )


def _is_plateau(scheduler: object) -> TypeGuard[ReduceLROnPlateau]:
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    return isinstance(scheduler, ReduceLROnPlateau)
