"""A window of micro-batches under way: what it ran, what it came to, and the state that it can be put back to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.training.batches import tensors_of
from autobatch.training.randomness import KeptGenerators

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

__all__ = ["Piece", "Window", "WindowResult", "WindowStart"]


@dataclass(frozen=True, kw_only=True)
class WindowResult:
    """What one optimizer step came to."""

    loss: torch.Tensor
    """The loss of the window on this rank, detached, on its device: the weighted mean of its micro-batches' losses, or their
    sum where losses are sums."""
    samples: int
    """Samples of this rank in the window."""
    count: float
    """What the loss is averaged over, on this rank: samples, or tokens by `count`."""
    micro_batch_sizes: tuple[int, ...]
    """As they ran."""
    grad_norm: torch.Tensor | None
    """Norm of all gradients before clipping; None without `max_grad_norm`."""
    stepped: bool
    """False where the GradScaler skipped the step for gradients that were not finite, or nothing made a gradient."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A micro-batch about to run."""

    batch: Any
    samples: int
    counted: float
    """What its loss is averaged over."""


class Window:
    """A window under way."""

    def __init__(self, *, expected: float) -> None:
        self.expected = expected
        """What all micro-batches of all ranks are taken to count, by which each is weighted."""
        self.given = 0
        """Micro-batches that the caller gave."""
        self.waiting: tuple[Any, int, Callable[[Any], torch.Tensor]] | None = None
        """A micro-batch held back, its samples and its loss function."""
        self._retained: list[tuple[Any, list[int]]] = []
        self.reset()

    def retain(self, batch: Any) -> None:
        """Keep a batch, from which the window can be done again."""
        self._retained.append((batch, _versions(batch)))

    def retained(self) -> list[Any]:
        """The batches that were kept."""
        return [batch for batch, _ in self._retained]

    def has_changed_inputs(self) -> bool:
        """Whether a kept batch was changed in place, by torch's own count of such changes."""
        return any(_versions(batch) != then for batch, then in self._retained)

    def reset(self) -> None:
        """Forget what ran."""
        self.samples, self.counted = 0, 0.0
        self.sizes: list[int] = []
        self._loss: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, piece: Piece, *, is_mean: bool) -> None:
        """Take in a micro-batch that ran."""
        self.samples += piece.samples
        self.counted += piece.counted
        self.sizes.append(piece.samples)
        if is_mean and not piece.counted:
            return  # a mean over nothing is not a number
        # In half precision the product with a count of tokens overflows.
        part = loss.float() if loss.element_size() < 4 else loss
        weight = piece.counted if is_mean else 1.0
        self._loss = part * weight if self._loss is None else self._loss.add_(part, alpha=weight)

    def result(self, norm: torch.Tensor | None, *, stepped: bool, is_mean: bool) -> WindowResult:
        """What the window came to; its loss is 0 where this rank held nothing that counts."""
        import torch

        loss = torch.zeros(()) if self._loss is None else self._loss
        return WindowResult(
            loss=loss / self.counted if is_mean and self.counted else loss,
            samples=self.samples,
            count=self.counted,
            micro_batch_sizes=tuple(self.sizes),
            grad_norm=norm,
            stepped=stepped,
        )


class WindowStart:
    """Buffers and random generators as they were when a window began.

    Copies of the buffers stay allocated and are filled again at each window, on the buffers' own devices. All are copied, since
    no mark tells which changed: batch norm's kernels write running statistics past the version counter.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note where the model has buffers; a buffer registered later is not kept."""
        self._slots = [(module._buffers, name) for module in model.modules() for name in module._buffers]  # noqa: SLF001
        # The module's own dict of buffers is the one place where a buffer that was replaced can be put back.
        self._buffers: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._held: list[torch.Tensor | None] = []
        self._generators = KeptGenerators()

    def keep(self) -> None:
        """Keep the state as it is now."""
        import torch

        held = [buffers.get(name) for buffers, name in self._slots]
        if len(held) != len(self._held) or any(now is not then for now, then in zip(held, self._held, strict=True)):
            self._held = held
            distinct = {id(buffer): buffer for buffer in held if buffer is not None and not _is_expanded(buffer)}
            self._buffers = list(distinct.values())
            self._copies = [torch.empty_like(buffer) for buffer in self._buffers]
        _copy(self._buffers, self._copies)
        self._generators.keep()

    def end(self) -> None:
        """Take note that the window ran to its end."""
        self._generators.end()

    def put_back(self) -> None:
        """Put the kept state back, in place; a buffer that was replaced becomes the earlier one again."""
        for (buffers, name), buffer in zip(self._slots, self._held, strict=True):
            if buffers.get(name) is not buffer:
                buffers[name] = buffer
        _copy(self._copies, self._buffers)
        self._generators.put_back()


def _versions(batch: Any) -> list[int]:
    return [tensor._version for tensor in tensors_of(batch)]  # noqa: SLF001 - the one count of changes in place


def _is_expanded(buffer: torch.Tensor) -> bool:
    """Tell whether elements share memory, which torch refuses to write in place: such a buffer cannot have changed."""
    return any(stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


def _copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    import torch

    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)  # as torch's own optimizers do
