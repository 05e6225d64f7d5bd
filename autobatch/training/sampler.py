"""A plan's micro-batches as lists of indices: every sample once an epoch, on one rank, in an order that a seed decides."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError
from autobatch.plan import check_int

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from autobatch.plan import Plan

__all__ = ["PlanBatchSampler"]

_MUST_AGREE = ("dataset_size", "effective_batch_size", "shuffle", "seed", "order")
_LAYOUT = ("world_size", "micro_batch_size", "accumulation_steps")
_POSITION = ("epoch", "windows", "micro_batches")


class PlanBatchSampler:
    """Yields a plan's micro-batches in order as lists of indices; `DataLoader(dataset, batch_sampler=...)` takes it.

    Order: seed and epoch decide one order of the data set for all ranks. Window w is the samples w·N to (w + 1)·N of it, N the
    effective batch size; ranks take their shares of a window one after the other, and micro-batches the share. What a window
    holds thus depends neither on the ranks nor on the micro-batch size, and an epoch can go on under another plan of the same
    effective batch size. No global random generator is read or changed.

    The last, incomplete window: shares at most one sample apart, in as few micro-batches as the plan's largest size allows, of
    sizes at most one apart (a `multiple_of` of the plan is not kept there). Every rank gets equally many micro-batches, since
    ranks that wait for each other would otherwise wait for ever; of the last window, samples that cannot be shared out so,
    fewer than there are ranks, are left out of the epoch. With `drop_last` all of it is. `dropped_samples` says how many.

    Position: `state_dict` counts the lists that were *taken from this object*. With `num_workers=0` these are the lists whose
    batches the loop has got. Workers fetch ahead: with `num_workers=w` and `prefetch_factor=p` up to w·p lists were taken that
    no step has seen, and a resumed run would leave them out. Save `state_at(windows)` then, counted by what was trained on:

        sampler.state_at(accumulator.optimizer_steps + accumulator.skipped_steps)

    Example:
        >>> import autobatch
        >>> plan = autobatch.make_plan(target=5, max_micro_batch_size=3, split="balanced")
        >>> list(PlanBatchSampler(plan, 12, shuffle=False))
        [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9], [10, 11]]
    """

    def __init__(
        self,
        plan: Plan,
        dataset_size: int,
        *,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        whole_batches: bool = False,
    ) -> None:
        """Lay out the epochs; the order of one is drawn when it is first asked for.

        Args:
            plan: what `probe` or `make_plan` gave; its ranks are those that the data set is shared by.
            dataset_size: samples in the data set, at least 1.
            rank: this process among the plan's ranks, 0 up to `world_size` − 1.
            shuffle: whether each epoch has an order of its own; otherwise the data set's.
            seed: what decides the order, the same on every rank.
            drop_last: whether a last window that is not full is left out.
            whole_batches: whether a list is a rank's share of a whole window, for `Accumulator.step`, instead of one micro-batch,
                for `Accumulator.add`.

        Raises:
            UsageError: an argument is out of range, or an epoch would have no window at all.
        """
        check_int("dataset_size", dataset_size, 1)
        check_int("rank", rank, 0)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UsageError(f"seed {seed!r} is not a whole number; give an int, the same on every rank")
        if rank >= plan.world_size:
            raise UsageError(f"rank {rank} is not below the plan's world_size {plan.world_size}; ranks count from 0")
        self._plan, self._rank = plan, rank
        self._dataset_size, self._shuffle, self._seed = dataset_size, shuffle, seed
        self._whole_batches = whole_batches
        full, left = divmod(dataset_size, plan.effective_batch_size)
        self._full_windows = full
        # sizes of the last window's micro-batches, by rank; empty where there is none
        self._last = () if drop_last else _last_window(left, plan)
        self._dropped = left - sum(map(sum, self._last))
        if not self.windows_per_epoch:
            raise UsageError(
                f"dataset_size {dataset_size} gives no window: an effective batch is {plan.effective_batch_size} samples on "
                f"{plan.world_size} ranks; plan for a target of at most {dataset_size}, without drop_last"
            )
        self._epoch = 0
        self._taken = 0
        self._resume_at = 0
        self._order: tuple[int, Sequence[int]] | None = None

    # ---- what an epoch has ------------------------------------------------------------------------------------------

    @property
    def windows_per_epoch(self) -> int:
        """Optimizer steps of one epoch, an incomplete last window included."""
        return self._full_windows + bool(self._last)

    @property
    def dropped_samples(self) -> int:
        """Samples that each epoch leaves out, over all ranks."""
        return self._dropped

    @property
    def epoch(self) -> int:
        """The epoch whose order is given out, from 0 on."""
        return self._epoch

    def __len__(self) -> int:
        """Lists in a whole epoch of this rank, also while one is resumed midway."""
        if self._whole_batches:
            return self.windows_per_epoch
        return self._full_windows * self._plan.accumulation_steps + (len(self._last[self._rank]) if self._last else 0)

    def __iter__(self) -> Iterator[list[int]]:
        """Give the lists of the epoch: from its start, or once from where `load_state_dict` left off."""
        self._taken = self._resume_at
        return self._lists()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, before iterating over it; the position of a loaded state stands if it is that state's epoch.

        Raises:
            UsageError: it is no whole number from 0 on.
        """
        check_int("epoch", epoch, 0)
        if epoch != self._epoch:
            self._epoch, self._taken, self._resume_at = epoch, 0, 0

    # ---- saving and resuming ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position by the lists taken so far, the same on every rank that took as many; whole numbers and a text."""
        return self._state(self._epoch, *self._place(self._taken))

    def state_at(self, windows: int) -> dict[str, Any]:
        """The position after so many windows, however far workers have fetched ahead.

        Args:
            windows: windows trained on since the start of epoch 0, where every epoch before ran in full: the accumulator's
                `optimizer_steps` + `skipped_steps`. It has to step incomplete windows (`last_window="step"`) or never see one
                (`drop_last`).

        Raises:
            UsageError: it is no whole number from 0 on.
        """
        check_int("windows", windows, 0)
        epoch, windows = divmod(windows, self.windows_per_epoch)
        return self._state(epoch, windows, 0)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next iteration gives the rest of its epoch, later ones whole epochs.

        The plan may have other micro-batches and ranks than the state's if the state lies between two windows.

        Raises:
            UsageError: it is no such state, or one of other data, another effective batch size, seed or order.
        """
        self._check_state(state)
        # The order of that epoch, drawn here, has to be the one that the state was taken in.
        ours = self._state(state["epoch"], 0, 0)
        must_agree = (*_MUST_AGREE, *(_LAYOUT if state["micro_batches"] else ()))
        for name in must_agree:
            if state[name] != ours[name]:
                raise UsageError(
                    f"the state was saved with {name} {state[name]}, here it is {ours[name]}: resume with the same"
                    + (", or from a state saved between two windows" if name in _LAYOUT else "")
                    + (" release of torch and the same seed, or start a new epoch" if name == "order" else "")
                )
        taken = self._index(state["windows"], state["micro_batches"])
        if taken is None:
            raise UsageError(
                f"the state stands after {state['windows']} windows and {state['micro_batches']} micro-batches, an epoch has "
                f"{self.windows_per_epoch} windows here: "
                + ("load it without whole_batches" if self._whole_batches else "start a new epoch")
            )
        self._epoch, self._taken, self._resume_at = state["epoch"], taken, taken

    def _check_state(self, state: Mapping[str, Any]) -> None:
        wanted = {*_MUST_AGREE, *_LAYOUT, *_POSITION}
        if set(state) != wanted:
            raise UsageError(f"the state has {', '.join(map(str, state))}; {', '.join(sorted(wanted))} are wanted")
        for name in _POSITION:
            check_int(f"the state's {name}", state[name], 0)

    def _state(self, epoch: int, windows: int, micro_batches: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "windows": windows,
            "micro_batches": micro_batches,
            "dataset_size": self._dataset_size,
            "effective_batch_size": self._plan.effective_batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
            # torch does not promise the same permutation in every release.
            "order": self._fingerprint(epoch),
            "world_size": self._plan.world_size,
            "micro_batch_size": self._plan.micro_batch_size,
            "accumulation_steps": self._plan.accumulation_steps,
        }

    def _place(self, taken: int) -> tuple[int, int]:
        """Windows, and micro-batches after them, that so many lists are."""
        if self._whole_batches:
            return taken, 0
        if taken >= len(self):
            return self.windows_per_epoch, 0
        return divmod(taken, self._plan.accumulation_steps)

    def _index(self, windows: int, micro_batches: int) -> int | None:
        """The number of lists up to a place; None where this epoch has no such place."""
        if windows > self.windows_per_epoch or (self._whole_batches and micro_batches):
            return None
        if self._whole_batches:
            return windows
        if windows == self.windows_per_epoch and not micro_batches:
            return len(self)
        taken = windows * self._plan.accumulation_steps + micro_batches
        return taken if micro_batches < self._plan.accumulation_steps and taken < len(self) else None

    # ---- the lists --------------------------------------------------------------------------------------------------

    def _lists(self) -> Iterator[list[int]]:
        # When the first list is drawn, not before: a loader with workers makes two iterators and draws from the second.
        start, self._resume_at = self._resume_at, 0
        order = self._order_of(self._epoch)
        for position in range(start, len(self)):
            windows, micro_batches = self._place(position)
            first, sizes = self._share(windows)
            if self._whole_batches:
                begin, size = first, sum(sizes)
            else:
                begin, size = first + sum(sizes[:micro_batches]), sizes[micro_batches]
            # Counted before it is given: at the moment that the caller holds the list, it was taken.
            self._taken = position + 1
            yield list(order[begin : begin + size])

    def _share(self, window: int) -> tuple[int, Sequence[int]]:
        """Where this rank's share of a window begins in the epoch's order, and its micro-batches' sizes."""
        plan, first = self._plan, window * self._plan.effective_batch_size
        ranks: Sequence[Sequence[int]] | None = (
            plan.rank_micro_batch_sizes if window < self._full_windows else self._last
        )
        if ranks is None:
            return first + self._rank * sum(plan.micro_batch_sizes), plan.micro_batch_sizes
        return first + sum(map(sum, itertools.islice(ranks, self._rank))), ranks[self._rank]

    def _order_of(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(self._dataset_size)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, _permutation(self._dataset_size, self._seed, epoch))
        return self._order[1]

    def _fingerprint(self, epoch: int) -> str:
        if not self._shuffle:
            return "as it lies"
        first = self._order_of(epoch)[:1024]
        return hashlib.sha256(repr(list(first)).encode()).hexdigest()[:16]


class _Permutation:
    """An order of a data set, kept as 8 bytes for each sample."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, part: slice) -> list[int]:
        return self._tensor[part].tolist()


def _permutation(size: int, seed: int, epoch: int) -> Any:
    import torch

    # Hashed together: added up, seed 1 in epoch 0 would be seed 0 in epoch 1.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    return _Permutation(torch.randperm(size, generator=generator, device="cpu"))


def _last_window(left: int, plan: Plan) -> tuple[tuple[int, ...], ...]:
    """The sizes of each rank's micro-batches in a window of fewer samples than the plan's, as many on every rank."""
    ranks, limit = plan.world_size, plan.micro_batch_size
    if limit == 1:
        left -= left % ranks  # one more sample would be one more micro-batch, on some ranks only
    if left < ranks:
        return ()
    largest = -(-left // ranks)
    steps = -(-largest // limit)
    return tuple(_equal_parts(share, steps) for share in _equal_parts(left, ranks))


def _equal_parts(total: int, parts: int) -> tuple[int, ...]:
    size, larger = divmod(total, parts)
    return (size + 1,) * larger + (size,) * (parts - larger)
