"""One window of a training job, taken apart: which of its memory belongs to what."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from autobatch.breakdown import MemoryBreakdown, find_peak
from autobatch.gpu.tracing import AllocatorTrace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from autobatch.breakdown import Owner, Peak
    from autobatch.trial import Trial

__all__ = ["WindowRecorder"]


class WindowRecorder:
    """Records one window, from before its first micro-batch until after its optimizer step.

    A context manager around the window. It sees each backward by standing in for `torch.autograd.backward`, and the step by
    torch's hook that comes before the steps of all optimizers, so that nothing is asked of the job.
    """

    def __init__(self, ordinal: int) -> None:
        """Prepare to record.

        Args:
            ordinal: the device as torch counts.
        """
        self._trace = AllocatorTrace(ordinal)
        self._stack = contextlib.ExitStack()
        self._owners: dict[int, Owner] = {}
        self._owned_at: int | None = None
        self._depth = 0
        self._peak: Peak | None = None

    def __enter__(self) -> Self:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self._stack.enter_context(self._trace)
        self._stack.enter_context(self._standing_in_for_backward())
        self._stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None and self._owned_at is not None and self._peak is None:
                events, before = self._trace.read(self._owned_at)
                self._peak = find_peak(self._trace.standing, events, self._owners, owned_at=before)

    def breakdown(self, trial: Trial) -> MemoryBreakdown | None:
        """What the window's memory was made of; None where no optimizer stepped in it.

        Args:
            trial: the trial whose window it was.
        """
        if self._peak is None:
            return None
        found = self._peak.bytes_by_owner
        return MemoryBreakdown(
            window=trial.window,
            phase=self._peak.phase,
            parameters_bytes=found.get("parameters", 0),
            gradients_bytes=found.get("gradients", 0),
            optimizer_state_bytes=found.get("optimizer_state", 0),
            other_held_bytes=found.get("other_held", 0),
            activations_bytes=found.get("activations", 0),
            temporary_bytes=found.get("temporary", 0),
            workspaces_bytes=found.get("workspaces", 0),
            unused_bytes=max(0, trial.peak_reserved_bytes - self._peak.total_bytes),
            context_bytes=max(0, trial.footprint_bytes - trial.peak_reserved_bytes),
        )

    @contextlib.contextmanager
    def _standing_in_for_backward(self) -> Iterator[None]:
        import torch

        backward = torch.autograd.backward

        def noted(*args: Any, **kwargs: Any) -> None:
            self._depth += 1
            self._trace.enter_phase("backward")
            try:
                backward(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:  # a checkpoint's own backward ends within another
                    self._trace.enter_phase("forward")

        torch.autograd.backward = noted
        try:
            yield
        finally:
            torch.autograd.backward = backward

    def _before_step(self, *_: object) -> None:
        """Note whose the memory is, now that the gradients of the whole window stand."""
        if self._owned_at is None:
            self._owners = dict(_owners())
            self._owned_at = self._trace.enter_phase("step")


def _owners() -> Iterator[tuple[int, Owner]]:
    """Addresses of what is there, and whose it is; a later one overrules an earlier one.

    Parameters and optimizers are found as the garbage collector knows them: also frozen ones that no optimizer has.
    """
    import torch

    alive = gc.get_objects()
    parameters = {id(one): one for one in alive if issubclass(type(one), torch.nn.Parameter)}
    for optimizer in (one for one in alive if issubclass(type(one), torch.optim.Optimizer)):
        for value in _tensors_in(getattr(optimizer, "state", {})):
            yield _address(value), "optimizer_state"
        groups = getattr(optimizer, "param_groups", ())
        parameters |= {id(one): one for group in groups for one in group["params"]}
    for parameter in parameters.values():
        if parameter.is_leaf and parameter.grad is not None:
            yield _address(parameter.grad), "gradients"
        yield _address(parameter), "parameters"


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in an optimizer's state, however it is nested."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors_in(inner)


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins on its device; of a `DTensor`, that of its part; 0 where it has none of its own."""
    local: torch.Tensor = getattr(tensor, "to_local", lambda: tensor)()
    try:
        return local.untyped_storage().data_ptr() if local.is_cuda else 0
    except (RuntimeError, NotImplementedError):  # a subclass without a storage
        return 0
