"""A training job is checked when it is made, in words that say what to pass instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autobatch.errors import WorkloadError
from autobatch.workload.job import TrainingJob


def _micro_step(_n: int) -> None:
    pass


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


def test_one_optimizer_and_several_are_taken(optimizer: torch.optim.Optimizer) -> None:
    """Several keep their order, in which they step."""
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert TrainingJob(micro_step=_micro_step, optimizer=optimizer).optimizers() == (optimizer,)
    assert TrainingJob(micro_step=_micro_step, optimizer=[other, optimizer]).optimizers() == (other, optimizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"micro_step": None}, r"micro_step is nothing \(None\).*micro_step\(n\)"),
        ({"micro_step": 32}, "micro_step is an int"),
        ({"optimizer": []}, r"no optimizer: pass the torch\.optim\.Optimizer"),
        ({"optimizer": None}, r"optimizer is nothing \(None\): pass a torch\.optim\.Optimizer"),
        ({"optimizer": "adam"}, "optimizer is a str"),
        ({"optimizer": torch.nn.Linear(2, 2).parameters()}, "optimizer is a generator"),
        ({"optimizer": torch.nn.Linear(2, 2)}, "optimizer is a Linear"),
        ({"scaler": True}, r"scaler is a bool: pass the torch\.amp\.GradScaler"),
        ({"end_window": 3}, "end_window is an int: pass a function without arguments"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(
    optimizer: torch.optim.Optimizer, arguments: dict[str, Any], message: str
) -> None:
    """Each argument that has no meaning is named with what it is and what to pass."""
    given = {"micro_step": _micro_step, "optimizer": optimizer, **arguments}
    with pytest.raises(WorkloadError, match=message):
        TrainingJob(**given)


def test_a_list_with_something_else_than_an_optimizer_is_refused(optimizer: torch.optim.Optimizer) -> None:
    """One good optimizer does not vouch for the next."""
    with pytest.raises(WorkloadError, match="optimizer is a dict"):
        TrainingJob(micro_step=_micro_step, optimizer=[optimizer, {}])  # type: ignore[list-item]  # the mistake tested


def test_a_factory_returns_a_job_or_a_pair(optimizer: torch.optim.Optimizer) -> None:
    """The pair is the short form, for factories that import nothing of this package."""
    job = TrainingJob(micro_step=_micro_step, optimizer=optimizer)
    assert TrainingJob.from_result(job, origin="train:job") is job
    made = TrainingJob.from_result((_micro_step, optimizer), origin="train:job")
    assert (made.micro_step, made.optimizer, made.scaler, made.end_window) == (_micro_step, optimizer, None, None)


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (None, r"nothing \(None\)"),
        (32, "an int"),
        ((_micro_step,), "a tuple"),
        ((_micro_step, None, None), "a tuple"),
        (("model", _micro_step), "a tuple"),
        ([_micro_step, None], "a list"),
        (_micro_step, "a function"),
    ],
)
def test_any_other_result_is_refused_by_name(result: object, kind: str) -> None:
    """The error names the factory, what it returned and what it is to return."""
    with pytest.raises(WorkloadError, match=rf"^train:job returned {kind}: a factory returns autobatch\.TrainingJob"):
        TrainingJob.from_result(result, origin="train:job")


def test_a_pair_without_an_optimizer_is_refused() -> None:
    """The second of the pair is what steps."""
    with pytest.raises(WorkloadError, match=r"optimizer is nothing \(None\)"):
        TrainingJob.from_result((_micro_step, None), origin="train:job")
