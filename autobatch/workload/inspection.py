"""What an emulated card cannot tell of a job: which of its operators read shapes from the device."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.emulator.inside import workspaces_are_known

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from autobatch.gpu.memory import DeviceMemory
    from autobatch.workload.job import TrainingJob

__all__ = ["Inspection", "OperatorWatch", "inspect_job"]

_log = logging.getLogger(__name__)

# Operators whose output's shape depends on values (ATen's `dynamic_output_shape` tag, and what the tag leaves out).
_BY_NAME = frozenset(
    {
        "nonzero",
        "masked_select",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "unique_dim_consecutive",
        "repeat_interleave",
        "bincount",
        # As many entries as there are values other than zero, which torch reads back; none carries the tag.
        "_to_sparse",
        "_to_sparse_csr",
        "_to_sparse_csc",
        "_to_sparse_bsr",
        "_to_sparse_bsc",
        "_coalesce",
    }
)
# A tensor indexed by a mask takes its shape from the mask's values; indexed by numbers, from the number of them.
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"})


_BENEATH = frozenset({"torch", "autobatch"})
_TRAINERS = ("transformers.trainer", "accelerate.", "lightning.", "pytorch_lightning.")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What one micro-batch of a job did."""

    data_dependent: tuple[str, ...]
    """Operators that read a shape, or a whole number that may be one, from the device; sorted."""
    has_convolutions: bool
    """Whether it ran convolutions."""
    workspaces_known: bool = False
    """Whether they took the workspaces that cuDNN names; else 0 bytes."""


def inspect_job(make_job: Callable[[], TrainingJob], memory: DeviceMemory, size: int) -> Inspection:
    """Run one micro-batch and look at every operator that it calls, forward and backward.

    A float read by `.item()` (a loss, a gradient's norm) is taken for what is logged; a whole number for what may
    become a size. Operators inside a compiled graph are not seen.

    Args:
        make_job: makes the job.
        memory: the device's memory, freed before and after.
        size: samples of the micro-batch.
    """
    memory.begin()
    watched = Inspection(data_dependent=(), has_convolutions=False)
    try:
        watched = _watch(make_job, size)
    except Exception:  # noqa: BLE001 - the trial that follows meets the same error, and explains it
        _log.debug("the job failed while it was inspected", exc_info=True)
    finally:
        memory.end()
    return watched


def _watch(make_job: Callable[[], TrainingJob], size: int) -> Inspection:
    import torch

    job = make_job()
    watch = OperatorWatch()
    watch.start()
    try:
        job.micro_step(size)
    finally:
        watch.stop()
    torch.cuda.synchronize()
    return watch.inspection()


class OperatorWatch:
    """Looks at every operator that is called between `start` and `stop`, in this thread and in the backwards that it runs."""

    def __init__(self) -> None:
        self._shapes: set[str] = set()
        self._has_convolutions = False
        self._mode: Any = None

    def start(self) -> None:
        """Begin to look."""
        from torch.utils._python_dispatch import TorchDispatchMode

        note = self._note

        class Watcher(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                note(func, args)
                return func(*args, **(kwargs or {}))

        self._mode = Watcher()  # type: ignore[no-untyped-call]  # torch's class has no annotations
        self._mode.__enter__()

    def stop(self) -> None:
        """Look no longer."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)

    def inspection(self) -> Inspection:
        """What was seen."""
        return Inspection(
            data_dependent=tuple(sorted(self._shapes)),
            has_convolutions=self._has_convolutions,
            workspaces_known=self._has_convolutions and workspaces_are_known(),
        )

    def _note(self, func: Any, args: Any) -> None:
        name = func._schema.name.removeprefix("aten::")  # noqa: SLF001 - the operator's name
        self._has_convolutions |= name.startswith(("convolution", "cudnn_convolution"))
        if reason := _reads_shape(name, func, args):
            self._shapes.add(reason)


def _reads_shape(name: str, func: Any, args: Any) -> str:
    import torch

    on_device = [value for value in _tensors(args) if value.is_cuda]
    if not on_device:
        return ""
    if name in _INDEXING:  # tagged as dynamic, which they are under a mask alone
        return "boolean index" if _has_mask(args) else ""
    if name in _BY_NAME or torch.Tag.dynamic_output_shape in func.tags:
        return name
    whole = on_device[0].dtype in {torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool}
    if name == "_local_scalar_dense" and whole and not _is_read_by_a_trainer():
        return "item"
    return ""


def _is_read_by_a_trainer() -> bool:
    """Whether the loop of a training framework reads the number, which it divides a loss by or logs, and makes no shape of."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - a whole stack for each number read would take long
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in _BENEATH:
            return module.startswith(_TRAINERS)
        frame = frame.f_back
    return False


def _has_mask(args: Any) -> bool:
    import torch

    return any(value.dtype in {torch.bool, torch.uint8} for value in _tensors(args[1:2]))


def _tensors(values: Any) -> list[Any]:
    import torch

    found: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(_tensors(value))
    return found
