"""How gradients meet over ranks: averaged at the last backward of a window, and not before."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from autobatch.errors import UsageError
from autobatch.snapshot.wrapped import wrappers_below

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

__all__ = ["AloneRank", "Meeting", "RankGradients", "gradients_of"]


@dataclass(frozen=True)
class Meeting:
    """What ranks tell each other where they meet: at a window's first and last micro-batch, and at the end of an epoch.

    All say all of it wherever they are, so that a rank that is elsewhere than the others is noticed rather than waited for.
    """

    counted: float = 0.0
    """What the window counts."""
    given: float = 0.0
    """Micro-batches held at the end of an epoch."""
    begins: float = 0.0
    """1 from a rank that begins a window."""
    barren: float = 0.0
    """1 from a rank that has no backward left by which gradients could meet."""
    finished: float = 0.0
    """1 from a rank at the end of its epoch."""


class RankGradients(Protocol):
    """What accumulation needs to know of the other ranks."""

    @property
    def averaged_over(self) -> int:
        """Ranks over whose gradients the wrapper takes the mean; 1 alone."""

    @property
    def rank(self) -> int:
        """This rank among them; 0 alone."""

    @property
    def can_retry(self) -> bool:
        """Whether a window that failed on this rank can be done again without the others."""

    def backward_of(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of forward and backward of one micro-batch; gradients meet in the last of a window."""

    @property
    def holds_whole(self) -> bool:
        """Whether `.grad` holds, before the last backward, what the earlier ones of a window gave."""

    def meet(self, mine: Meeting) -> Meeting:
        """The sums over all ranks; every rank waits here for the others."""

    def meet_late(self) -> None:
        """Let gradients meet that no last backward brought together."""

    def check_same(self, number: int) -> None:
        """Refuse, on every rank, numbers of micro-batches that differ where that would hang."""

    def forget(self) -> None:
        """Ready the wrapper for a new window where one is left half-way, and let go of the gradients that it keeps itself."""


class AloneRank:
    """No other rank, or none that a wrapper of torch synchronises with."""

    averaged_over = 1
    rank = 0
    can_retry = True
    holds_whole = True

    def backward_of(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Nothing is to be held back."""
        del last
        return contextlib.nullcontext()

    def meet(self, mine: Meeting) -> Meeting:
        """What this rank says itself."""
        return mine

    def meet_late(self) -> None:
        """Nothing is to be brought together."""

    def check_same(self, number: int) -> None:
        """Nothing can differ."""

    def forget(self) -> None:
        """Nothing is kept."""


class _DistributedRank:
    """Ranks of `torch.distributed`.

    They tell each other numbers in host memory, over gloo: it waits for no kernel, and works where collectives on the device
    carry no values, as on emulated cards.
    """

    can_retry = False

    def __init__(self, model: nn.Module, group: torch.distributed.ProcessGroup | None) -> None:
        import torch.distributed as dist

        self._model = model
        self._group = group
        self._talks = _host_group(group)
        self.averaged_over = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def meet(self, mine: Meeting) -> Meeting:
        """The sums over all ranks, by one small collective."""
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(dataclasses.astuple(mine), dtype=torch.float64, device="cpu")
        dist.all_reduce(numbers, group=self._talks)
        return Meeting(*numbers.tolist())

    def forget(self) -> None:
        """A reducer waits for gradients that will not come; FSDP2 keeps those of backwards that did not meet."""
        for _, ready in wrappers_below(self._model):
            ready()


def _host_group(group: torch.distributed.ProcessGroup | None) -> torch.distributed.ProcessGroup | None:
    """A group of the same ranks that carries tensors of the host."""
    import torch.distributed as dist

    if dist.get_backend(group) == "gloo":
        return group
    if group is None or dist.get_world_size(group) == dist.get_world_size():
        made = dist.new_group(backend="gloo")
    else:  # made by its own ranks alone, each with a model of its own
        made = dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
    return made if isinstance(made, dist.ProcessGroup) else None


class _DdpRank(_DistributedRank):
    """Under `DistributedDataParallel`."""

    holds_whole = True

    def __init__(self, model: torch.nn.parallel.DistributedDataParallel) -> None:
        super().__init__(model, model.process_group)
        self._wrapper = model
        if model.static_graph:
            raise UsageError(
                "DistributedDataParallel(static_graph=True) cannot hold gradients back in its first window: leave it out"
            )

    @contextlib.contextmanager
    def backward_of(self, *, last: bool) -> Iterator[None]:
        """Held back by `no_sync` but for the last (DistributedDataParallel.no_sync's own documentation)."""
        with contextlib.nullcontext() if last else self._wrapper.no_sync():
            yield

    def meet_late(self) -> None:
        """Average what every rank holds; a rank that holds none counts with zeros."""
        import torch
        import torch.distributed as dist

        parameters = [value for value in self._wrapper.module.parameters() if value.requires_grad]
        held = torch.tensor([value.grad is not None for value in parameters], dtype=torch.int32, device="cpu")
        dist.all_reduce(held, group=self._talks)
        for parameter, holders in zip(parameters, held.tolist(), strict=True):
            if not holders:
                continue  # used by no rank: without a gradient an optimizer leaves it alone
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self._group)
            parameter.grad.div_(self.averaged_over)

    def check_same(self, number: int) -> None:
        """Each rank's last backward meets the others', however many it held back before."""


class _FsdpRank(_DistributedRank):
    """Under FSDP2 (`torch.distributed.fsdp.fully_shard`), sharded over all ranks."""

    holds_whole = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, None)

    @contextlib.contextmanager
    def backward_of(self, *, last: bool) -> Iterator[None]:
        """Held back by `set_requires_gradient_sync` but for the last."""
        self._model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def meet_late(self) -> None:
        """Nothing: the backward of the micro-batch that waited brought them together."""

    def check_same(self, number: int) -> None:
        """Every forward gathers the parameters from all ranks: unequal numbers would wait for ever."""
        import torch
        import torch.distributed as dist

        bounds = torch.tensor([number, -number], device="cpu")
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._talks)
        most, least = int(bounds[0]), -int(bounds[1])
        if most != least:
            raise UsageError(
                f"ranks would run {least} to {most} micro-batches in this window, and FSDP waits for every rank at each: give "
                "every rank as many samples (drop_last, or the plan's own sampler)"
            )


def gradients_of(model: nn.Module) -> RankGradients:
    """Tell how a model's gradients meet over ranks.

    Raises:
        UsageError: it is wrapped in a way that is not known here.
    """
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    outer = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if isinstance(outer, DistributedDataParallel):
        return _DdpRank(outer)
    if isinstance(outer, DataParallel):
        raise UsageError(
            "torch.nn.DataParallel splits each micro-batch over cards itself: wrap the model in DistributedDataParallel"
        )
    if any(isinstance(part, DistributedDataParallel) for part in outer.modules()):
        raise UsageError(
            "a part of the model is in DistributedDataParallel: wrap the whole model, or give that part as model"
        )
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in outer.modules()):
        raise UsageError(
            "FullyShardedDataParallel cannot be held back exactly here: shard by fully_shard (FSDP2) instead"
        )
    if callable(getattr(outer, "set_requires_gradient_sync", None)):
        return _FsdpRank(outer)
    return AloneRank()
