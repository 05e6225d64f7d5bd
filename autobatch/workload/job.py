"""What a training job is to a probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.errors import WorkloadError

if TYPE_CHECKING:
    import torch

__all__ = ["TrainingJob"]


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training job: a micro-step of any size, and the optimizer that ends a window.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(8, 1)
        >>> def micro_step(n: int) -> None:
        ...     model(torch.randn(n, 8)).mean().backward()
        >>> job = TrainingJob(micro_step=micro_step, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    """

    micro_step: Callable[[int], object]
    """Called with n, the samples of one micro-batch: builds the *largest* batch of n samples that training
    will see (its longest sequence, its largest image), runs forward and `backward()`. Does not step."""
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
    """What steps at the end of each window; several are stepped in their order."""
    scaler: torch.amp.GradScaler | None = None
    """The scaler by which the micro-step scales its loss, where it does."""
    end_window: Callable[[], object] | None = None
    """What ends a window instead of stepping and zeroing the optimizers, such as clipping before the step."""

    def __post_init__(self) -> None:
        if not callable(self.micro_step):
            raise WorkloadError(
                f"micro_step is {_kind(self.micro_step)}, not a function of the micro-batch size: pass a function "
                "micro_step(n) that runs forward and backward on n samples"
            )
        if not self.optimizers():
            raise WorkloadError("the training job has no optimizer: pass the torch.optim.Optimizer that trains it")
        for optimizer in self.optimizers():
            if not callable(getattr(optimizer, "step", None)) or not hasattr(optimizer, "param_groups"):
                raise WorkloadError(f"optimizer is {_kind(optimizer)}: pass a torch.optim.Optimizer, or a list of them")
        if self.scaler is not None and not callable(getattr(self.scaler, "unscale_", None)):
            raise WorkloadError(f"scaler is {_kind(self.scaler)}: pass the torch.amp.GradScaler that scales the loss")
        if self.end_window is not None and not callable(self.end_window):
            raise WorkloadError(
                f"end_window is {_kind(self.end_window)}: pass a function without arguments that steps and zeroes the "
                "optimizer"
            )

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Every optimizer, in the order in which they step."""
        return tuple(self.optimizer) if isinstance(self.optimizer, Sequence) else (self.optimizer,)

    @classmethod
    def from_result(cls, result: object, *, origin: str) -> TrainingJob:
        """Take what a factory returned.

        Args:
            result: a `TrainingJob`, or a pair (micro_step, optimizer).
            origin: the factory's name, for the error.

        Raises:
            WorkloadError: it is neither.
        """
        if isinstance(result, TrainingJob):
            return result
        if isinstance(result, tuple) and len(result) == 2 and callable(result[0]):
            return cls(micro_step=result[0], optimizer=result[1])
        raise WorkloadError(
            f"{origin} returned {_kind(result)}: a factory returns autobatch.TrainingJob(micro_step=..., optimizer=...), "
            "or the pair (micro_step, optimizer)"
        )


def _kind(value: object) -> str:
    if value is None:
        return "nothing (None)"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
