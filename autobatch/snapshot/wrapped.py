"""Models that are wrapped for several ranks: what of a tensor lies here, and what a failed pass leaves in a wrapper."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch

__all__ = [
    "gather_nothing",
    "is_handled",
    "is_sharded",
    "local_part",
    "sharded_as",
    "unnamed_wrapper",
    "wrappers_below",
]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a `DTensor`, as FSDP2 makes of parameters, of which this process holds a part."""
    import sys

    module = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor that this process holds: of a `DTensor` its part, over the same memory; else the tensor itself."""
    if is_sharded(tensor):
        return cast("torch.Tensor", cast("Any", tensor)._local_tensor)
    return tensor


def sharded_as(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What wraps a plain tensor as this one is: as a part of a `DTensor`, or not at all."""
    if not is_sharded(tensor):
        return lambda local: local
    from torch.distributed.tensor import DTensor

    spec: Any = tensor
    mesh, placements, shape, stride = spec.device_mesh, spec.placements, tensor.shape, tensor.stride()

    def wrap(local: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    return wrap


def wrappers_below(module: torch.nn.Module) -> Iterator[tuple[str, Callable[[], object]]]:
    """The wrappers among a module and those below it, each with what readies it for a pass after one that failed half-way.

    A reducer of DDP waits for the gradients of a backward that will not come; FSDP2 leaves parameters gathered and gradients
    on their way.
    """
    from torch.nn.parallel import DistributedDataParallel

    for part in module.modules():
        if isinstance(part, DistributedDataParallel):
            yield type(part).__name__, part.reducer._reset_state
        elif _is_fsdp(part):
            yield type(part).__name__, functools.partial(_reset_fsdp, part)


def gather_nothing(module: torch.nn.Module) -> None:
    """Let FSDP2 let go of what it gathered, as it keeps the root's parameters after a pass without a backward."""
    for part in module.modules():
        if _is_fsdp(part):
            cast("Any", part).reshard()


def is_handled(module: object) -> bool:
    """Whether a module is in a wrapper that is known here: DDP, or FSDP2 (`fully_shard`)."""
    from torch.nn.parallel import DistributedDataParallel

    return isinstance(module, DistributedDataParallel) or _is_fsdp(module)


def unnamed_wrapper(named: Sequence[object], parameters: Iterable[torch.Tensor]) -> str | None:
    """The kind of a wrapper that holds some of the parameters, and is not below what is named; None where there is none.

    Args:
        named: what a snapshot is to cover.
        parameters: what is trained.
    """
    import gc

    from torch import nn

    covered = {id(part) for each in named if isinstance(each, nn.Module) for part in each.modules()}
    trained = {id(parameter) for parameter in parameters}
    # By their types: to ask a proxy for its class may run code of its own.
    modules = [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]
    for module in modules:
        if id(module) not in covered and is_handled(module) and any(id(one) in trained for one in module.parameters()):
            return "DistributedDataParallel" if not _is_fsdp(module) else "FSDP2 (fully_shard)"
    return None


def _is_fsdp(module: object) -> bool:
    # By its type: what torch.compile returns passes on every attribute of the model that it compiled.
    return callable(getattr(type(module), "set_requires_gradient_sync", None))


def _reset_fsdp(module: Any) -> None:
    """Ready FSDP2 at the module that its passes begin with; the others go with it."""
    state = module._get_fsdp_state()
    if not state._is_root:  # a part of another, or one that never ran
        return
    reset = getattr(module, "reset_iter_state", None)
    if reset is not None:
        reset()
    else:
        _reset_older_fsdp(state)


def _reset_older_fsdp(state: Any) -> None:
    """As `FSDPModule.reset_iter_state` of later versions: parameters sharded, trackers of the pass emptied.

    Torch is waited for first, so that no gather is still under way.
    """
    import torch
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    context, communication = state._state_ctx, state._comm_ctx
    for each in context.all_states:
        each._modules_to_run_forward.clear()
        each._training_state = TrainingState.IDLE
        groups = getattr(each, "_fsdp_param_groups", None) or [each._fsdp_param_group]
        for group in filter(None, groups):
            gathered = group._all_gather_result
            if gathered is not None and hasattr(gathered.all_gather_work, "wait"):
                gathered.all_gather_work.wait()
            for name in ("_all_gather_result", "_post_reduce_event", "_all_reduce_state", "_partial_reduce_output"):
                setattr(group, name, None)
            group._reshard_after_forward_event = None
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            for parameter in group.fsdp_params:
                unsharded = getattr(parameter, "_unsharded_param", None)
                if unsharded is not None:
                    unsharded.grad = None
                parameter.unsharded_accumulated_grad = None
            group._to_sharded()
    communication.post_forward_order.clear()
    communication.all_gather_state = communication.reduce_scatter_state = None
    context.iter_forward_root = None
    context.post_backward_final_callback_queued = False
