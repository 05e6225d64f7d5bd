"""What an emulated card cannot tell of a job: which of its operators read shapes from the device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch.gpu.memory import DeviceMemory
    from autobatch.workload.job import TrainingJob

__all__ = ["Inspection", "inspect_job"]

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


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What one micro-batch of a job did."""

    data_dependent: tuple[str, ...]
    """Operators that read a shape, or a whole number that may be one, from the device; sorted."""
    has_convolutions: bool
    """Whether it ran convolutions, whose workspaces the emulated card does not model."""


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
    from torch.utils._python_dispatch import TorchDispatchMode

    found: set[str] = set()
    convolutions: set[str] = set()

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.removeprefix("aten::")  # noqa: SLF001 - the operator's name
            if name.startswith(("convolution", "cudnn_convolution")):
                convolutions.add(name)
            if reason := _reads_shape(name, func, args):
                found.add(reason)
            return func(*args, **(kwargs or {}))

    job = make_job()
    with Watcher():  # type: ignore[no-untyped-call]  # torch's class has no annotations
        job.micro_step(size)
    torch.cuda.synchronize()
    return Inspection(data_dependent=tuple(sorted(found)), has_convolutions=bool(convolutions))


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
    if name == "_local_scalar_dense" and whole:
        return "item"
    return ""


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
