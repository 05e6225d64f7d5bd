"""The sampler gives each sample once an epoch, in the plan's sizes, and goes on where it was stopped."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.errors import PlanError, UsageError
from autobatch.plan import Plan, make_plan
from autobatch.snapshot import state_hash
from autobatch.training.accumulator import Accumulator
from autobatch.training.sampler import PlanBatchSampler

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    world_size = draw(st.integers(1, 5))
    limit = draw(st.integers(1, 7))
    target = draw(st.integers(world_size, 60))
    split = draw(st.sampled_from(["even", "balanced"]))
    try:
        return make_plan(target=target, max_micro_batch_size=limit, world_size=world_size, split=split)
    except PlanError:
        return make_plan(target=world_size * limit, max_micro_batch_size=limit, world_size=world_size)


def samplers(plan: Plan, size: int, **options: Any) -> list[PlanBatchSampler]:
    return [PlanBatchSampler(plan, size, rank=rank, **options) for rank in range(plan.world_size)]


def sizes_of(plan: Plan, rank: int) -> list[int]:
    return list((plan.rank_micro_batch_sizes or (plan.micro_batch_sizes,) * plan.world_size)[rank])


@QUICK
@given(plans(), st.integers(1, 200), st.booleans(), st.booleans())
def test_every_sample_comes_once_and_no_rank_shares_one(plan: Plan, size: int, drop_last: bool, whole: bool) -> None:
    """Over all ranks: no index twice, all but the dropped ones there, and as many lists as `len` says."""
    if size < plan.effective_batch_size:
        size += plan.effective_batch_size
    ranks = samplers(plan, size, seed=3, drop_last=drop_last, whole_batches=whole)
    lists = [list(sampler) for sampler in ranks]
    indices = [index for rank in lists for one in rank for index in one]
    assert len(indices) == len(set(indices)) == size - ranks[0].dropped_samples
    assert set(indices) <= set(range(size))
    assert [len(rank) for rank in lists] == [len(sampler) for sampler in ranks]
    # No rank runs a micro-batch more than another: they would wait for each other.
    assert len({len(rank) for rank in lists}) == 1
    left = size % plan.effective_batch_size
    assert ranks[0].dropped_samples == left if drop_last else ranks[0].dropped_samples < plan.world_size
    if plan.world_size == 1 and not drop_last:
        assert ranks[0].dropped_samples == 0


@QUICK
@given(plans(), st.integers(0, 3), st.integers(0, 59))
def test_the_sizes_are_the_plans(plan: Plan, windows: int, left: int) -> None:
    """Full windows have the plan's sizes in order; the last one is at most one apart, over ranks and micro-batches."""
    left %= plan.effective_batch_size
    size = windows * plan.effective_batch_size + left
    if windows == 0 and left < plan.world_size + plan.world_size:
        return
    lasts = []
    for rank, sampler in enumerate(samplers(plan, size)):
        given_sizes = [len(one) for one in sampler]
        full = windows * plan.accumulation_steps
        assert given_sizes[:full] == sizes_of(plan, rank) * windows
        lasts.append(given_sizes[full:])
    assert all(one <= plan.micro_batch_size for rank in lasts for one in rank)
    assert all(max(rank) - min(rank) <= 1 for rank in lasts if rank)
    shares = [sum(rank) for rank in lasts]
    assert max(shares) - min(shares) <= 1
    assert all(len(rank) <= plan.accumulation_steps for rank in lasts)


@QUICK
@given(plans(), st.integers(1, 120), st.integers(0, 300), st.booleans())
def test_a_state_taken_anywhere_gives_the_same_rest(plan: Plan, size: int, stop: int, whole: bool) -> None:
    """Stopped after any list, a new sampler that loads the state gives what the first would have given."""
    size += plan.effective_batch_size
    rank = plan.world_size - 1
    first = PlanBatchSampler(plan, size, rank=rank, seed=5, whole_batches=whole)
    first.set_epoch(2)
    everything = list(first)
    stop %= len(everything) + 1
    iterator = iter(first)
    for _ in range(stop):
        next(iterator)
    second = PlanBatchSampler(plan, size, rank=rank, seed=5, whole_batches=whole)
    second.load_state_dict(first.state_dict())
    second.set_epoch(2)  # as a resumed loop calls it
    assert second.state_dict() == first.state_dict()
    assert list(second) == everything[stop:]
    assert list(second) == everything, "only the next iteration is the rest"
    second.set_epoch(3)
    assert len(list(second)) == len(everything)


def test_another_epoch_has_another_order_and_seeds_do_not_shift_into_epochs() -> None:
    """Orders differ between epochs and between seeds, are the same again, and seed 1 epoch 0 is not seed 0 epoch 1."""
    plan = make_plan(target=8, max_micro_batch_size=4)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        sampler = PlanBatchSampler(plan, 64, seed=seed)
        sampler.set_epoch(epoch)
        orders.append([index for one in sampler for index in one])
        assert orders[-1] == [index for one in sampler for index in one]
        assert orders[-1] != sorted(orders[-1])
    assert len({tuple(order) for order in orders}) == 4


def test_the_global_generators_are_not_touched() -> None:
    """Drawing, saving and resuming leave every random generator as it was, and do not depend on one."""
    plan = make_plan(target=8, max_micro_batch_size=3, split="balanced")
    torch.manual_seed(1)
    before = state_hash([])
    sampler = PlanBatchSampler(plan, 50)
    first = list(sampler)
    sampler.load_state_dict(sampler.state_dict())
    assert state_hash([]) == before
    torch.manual_seed(2)
    random.seed(2)
    assert list(PlanBatchSampler(plan, 50)) == first


def test_a_default_device_does_not_move_the_order() -> None:
    """Inside `torch.device("meta")`, as models are built, indices are numbers still."""
    plan = make_plan(target=4, max_micro_batch_size=2)
    expected = list(PlanBatchSampler(plan, 12))
    with torch.device("meta"):
        assert list(PlanBatchSampler(plan, 12)) == expected


def test_windows_hold_the_same_samples_under_another_split_and_other_ranks() -> None:
    """A run that goes on between two windows with smaller micro-batches or other ranks trains on the rest, once each."""
    wide = PlanBatchSampler(make_plan(target=12, max_micro_batch_size=6), 60)
    iterator = iter(wide)
    seen = {index for _ in range(4) for index in next(iterator)}
    state = wide.state_dict()
    assert (state["windows"], state["micro_batches"]) == (2, 0)
    narrow = samplers(make_plan(target=12, max_micro_batch_size=2, world_size=3), 60)
    for sampler in narrow:
        sampler.load_state_dict(state)
    rest = [index for sampler in narrow for one in sampler for index in one]
    assert len(rest) == 36
    assert set(rest) == set(range(60)) - seen
    next(iterator)
    with pytest.raises(UsageError, match=r"world_size 1, here it is 3: .* between two windows"):
        narrow[0].load_state_dict(wide.state_dict())


def test_fewer_samples_left_than_ranks_are_left_out_and_counted() -> None:
    """Two samples for three ranks: a rank without one could not join the others' collectives."""
    plan = make_plan(target=12, max_micro_batch_size=2, world_size=3)
    ranks = samplers(plan, 26)
    assert [sampler.dropped_samples for sampler in ranks] == [2, 2, 2]
    assert [sampler.windows_per_epoch for sampler in ranks] == [2, 2, 2]
    assert [len(one) for one in samplers(plan, 29)[0]] == [2, 2, 2, 2, 2]
    with pytest.raises(UsageError, match=r"dataset_size 2 gives no window"):
        PlanBatchSampler(plan, 2)


def test_micro_batches_of_one_stay_as_many_on_every_rank() -> None:
    """Five samples, two ranks, size 1: three on one rank would close the window there and not on the other."""
    plan = make_plan(target=6, max_micro_batch_size=1, world_size=2)
    ranks = samplers(plan, 11)
    assert [[len(one) for one in sampler] for sampler in ranks] == [[1] * 5, [1] * 5]
    assert ranks[0].dropped_samples == 1


def test_workers_fetch_ahead_and_the_accumulators_count_mends_it() -> None:
    """With workers the lists taken run ahead of the steps; `state_at` of the accumulator's counts loses no sample."""
    plan = make_plan(target=4, max_micro_batch_size=2)
    data = torch.arange(40, dtype=torch.float32).unsqueeze(1)
    sampler = PlanBatchSampler(plan, 40, seed=1)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data), batch_sampler=sampler, num_workers=1, prefetch_factor=4
    )
    model = torch.nn.Linear(1, 1)
    accumulator = Accumulator(plan, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    seen: list[float] = []
    for batch in loader:
        seen += batch[0].flatten().tolist()
        accumulator.add(batch, lambda one: model(one[0]).mean())
        if accumulator.optimizer_steps == 3:
            break
    assert sampler.state_dict()["windows"] > 3
    resumed = PlanBatchSampler(plan, 40, seed=1)
    resumed.load_state_dict(sampler.state_at(accumulator.optimizer_steps + accumulator.skipped_steps))
    seen += [float(index) for one in resumed for index in one]
    assert sorted(seen) == [float(index) for index in range(40)]


def test_a_loader_without_workers_counts_what_the_loop_got() -> None:
    """With `num_workers=0` the state after a batch stands right after it."""
    plan = make_plan(target=5, max_micro_batch_size=3, split="balanced")
    sampler = PlanBatchSampler(plan, 23)
    loader: Any = torch.utils.data.DataLoader(range(23), batch_sampler=sampler)  # type: ignore[arg-type]
    assert len(loader) == len(sampler) == 9
    got = []
    for batch in loader:
        got.append(batch.tolist())
        if len(got) == 3:
            break
    resumed = PlanBatchSampler(plan, 23)
    resumed.load_state_dict(sampler.state_dict())
    assert got + list(resumed) == list(sampler)


def test_state_at_counts_epochs() -> None:
    """Windows since epoch 0 are turned into the epoch and the windows within it."""
    plan = make_plan(target=8, max_micro_batch_size=4)
    state = PlanBatchSampler(plan, 20).state_at(7)
    assert (state["epoch"], state["windows"], state["micro_batches"]) == (2, 1, 0)


def test_a_state_of_other_data_is_refused() -> None:
    """Each thing that decides the order is compared, and both values are named."""
    plan = make_plan(target=4, max_micro_batch_size=2)
    state = PlanBatchSampler(plan, 20, seed=1).state_dict()
    for other, message in (
        (PlanBatchSampler(plan, 21, seed=1), "dataset_size 20, here it is 21"),
        (PlanBatchSampler(plan, 20, seed=2), "seed 1, here it is 2"),
        (PlanBatchSampler(plan, 20, seed=1, shuffle=False), "shuffle True, here it is False"),
        (PlanBatchSampler(make_plan(target=8, max_micro_batch_size=2), 20, seed=1), "effective_batch_size 4"),
    ):
        with pytest.raises(UsageError, match=message):
            other.load_state_dict(state)
    same = PlanBatchSampler(plan, 20, seed=1)
    for broken, message in (
        ({**state, "order": "0"}, "order 0"),
        ({**state, "windows": 6}, "after 6 windows"),
        ({**state, "micro_batches": 2}, "2 micro-batches"),
        ({**state, "epoch": -1}, "epoch -1"),
        ({"epoch": 0}, "are wanted"),
    ):
        with pytest.raises(UsageError, match=message):
            same.load_state_dict(broken)


def test_arguments_out_of_range_are_refused() -> None:
    """A rank that the plan has not, a size below 1, an epoch below 0."""
    plan = make_plan(target=4, max_micro_batch_size=2, world_size=2)
    with pytest.raises(UsageError, match="rank 2 is not below the plan's world_size 2"):
        PlanBatchSampler(plan, 20, rank=2)
    with pytest.raises(UsageError, match="dataset_size 0"):
        PlanBatchSampler(plan, 0)
    with pytest.raises(UsageError, match="seed 'a'"):
        PlanBatchSampler(plan, 20, seed="a")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="epoch -1"):
        PlanBatchSampler(plan, 20).set_epoch(-1)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_loader_resumes_where_the_state_says(workers: int) -> None:
    """With workers torch makes two iterators, and draws from the second alone."""
    plan = make_plan(target=4, max_micro_batch_size=2)
    sampler = PlanBatchSampler(plan, 12, shuffle=False)
    sampler.load_state_dict(sampler.state_at(1))
    loader = torch.utils.data.DataLoader(range(12), batch_sampler=sampler, num_workers=workers)
    assert [batch.tolist() for batch in loader] == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert next(iter(loader)).tolist() == [0, 1]
