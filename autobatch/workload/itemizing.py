"""One window of a training job, taken apart: which of its memory belongs to what."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from autobatch.breakdown import MemoryBreakdown, find_peak
from autobatch.gpu.tracing import AllocatorTrace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from autobatch.breakdown import Owner, Peak, Phase
    from autobatch.trial import Trial

__all__ = ["WindowRecorder"]


class WindowRecorder:
    """Records one window, from before its first micro-batch until after its optimizer step.

    A context manager around the window. It sees each backward by standing in for `torch.autograd.backward` and
    `torch.autograd.grad`, and each step by torch's hooks around the steps of all optimizers, so that nothing is asked of the
    job. Whose the memory is, is looked at when the window begins and ends, around each backward, and before each step.
    """

    def __init__(self, ordinal: int, *, sees_steps: bool = True) -> None:
        """Prepare to record.

        Args:
            ordinal: the device as torch counts.
            sees_steps: whether it hooks itself into the steps; else whoever does calls `before_step` and `after_step`.
        """
        self._sees_steps = sees_steps
        self._trace = AllocatorTrace(ordinal)
        self._stack = contextlib.ExitStack()
        self._notes: list[tuple[int, dict[int, Owner]]] = []
        self._before: list[Phase] = []
        """What ran before each backward or step that is under way: they nest."""
        self._has_stepped = False
        self._peak: Peak | None = None

    def __enter__(self) -> Self:
        from torch.optim import optimizer

        try:
            self._stack.enter_context(self._trace)
            self._stack.enter_context(self._standing_in("backward"))
            self._stack.enter_context(self._standing_in("grad"))
            if self._sees_steps:
                self._stack.callback(optimizer.register_optimizer_step_pre_hook(self.before_step).remove)
                self._stack.callback(optimizer.register_optimizer_step_post_hook(self.after_step).remove)
            self._note_owners()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None and self._has_stepped and self._peak is None:
                self._note_owners()
                events, counts = self._trace.read([moment for moment, _ in self._notes])
                owners = [found for _, found in self._notes]
                self._peak = find_peak(self._trace.standing, events, zip(counts, owners, strict=True))

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
    def _standing_in(self, name: str) -> Iterator[None]:
        """Note when one of autograd's functions runs."""
        import torch

        function = getattr(torch.autograd, name)

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            is_outermost = "backward" not in {self._trace.phase, *self._before}
            if is_outermost:
                self._note_owners()
            self._enter("backward")
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()
                if is_outermost:
                    self._note_owners()

        setattr(torch.autograd, name, noted)
        try:
            yield
        finally:
            setattr(torch.autograd, name, function)

    def _enter(self, phase: Phase) -> None:
        self._before.append(self._trace.phase)
        self._trace.enter_phase(phase)

    def _leave(self) -> None:
        self._trace.enter_phase(self._before.pop() if self._before else "forward")

    def before_step(self, *_: object) -> None:
        """Note that an optimizer is about to step."""
        self._note_owners()
        self._has_stepped = True
        self._enter("step")

    def after_step(self, *_: object) -> None:
        """Note that an optimizer has stepped."""
        self._leave()

    def _note_owners(self) -> None:
        self._notes.append((self._trace.now(), dict(_owners())))


def _owners() -> Iterator[tuple[int, Owner]]:
    """Addresses of what is there, and whose it is; a later one overrules an earlier one.

    Parameters and optimizers are found as the garbage collector knows them: also frozen ones that no optimizer has.
    """
    import torch

    alive = gc.get_objects()
    parameters = {id(one): one for one in alive if issubclass(type(one), torch.nn.Parameter)}
    for optimizer in (one for one in alive if issubclass(type(one), torch.optim.Optimizer)):
        yield from _owned(getattr(optimizer, "state", {}), "optimizer_state")
        groups = getattr(optimizer, "param_groups", ())
        parameters |= {id(one): one for group in groups for one in group["params"]}
    for parameter in parameters.values():
        if parameter.is_leaf:
            yield from _owned(parameter.grad, "gradients")
        yield from _owned(parameter, "parameters")


def _owned(value: object, owner: Owner) -> Iterator[tuple[int, Owner]]:
    """Addresses of the tensors in a value, however it is nested; of one that wraps others, such as a `DTensor`, of those."""
    import torch

    if isinstance(value, torch.Tensor):
        inner = _wrapped(value)
        if inner is not None:
            yield from _owned(inner, owner)
        elif address := _address(value):
            yield address, owner
    elif isinstance(value, Mapping):
        yield from _owned(list(value.values()), owner)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _owned(one, owner)


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins on its device; 0 where it has none, or does not say, as one that is not made yet."""
    try:
        return tensor.untyped_storage().data_ptr() if tensor.is_cuda else 0
    except (RuntimeError, NotImplementedError, ValueError):
        return 0


def _wrapped(tensor: torch.Tensor) -> list[object] | None:
    """The tensors that a subclass wraps, as it tells `torch.compile` too; None where it is a plain one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return None
    names, _ = flatten()
    return [getattr(tensor, name) for name in names]
