"""The state that a window began with is put back, in place."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from autobatch.training.randomness import LOOK_EVERY, KeptGenerators
from autobatch.training.window import WindowStart

if TYPE_CHECKING:
    from collections.abc import Callable


def test_buffers_and_generators_are_put_back() -> None:
    """Written in place or replaced; an expanded buffer, which torch lets nobody write, is left alone."""
    model = nn.BatchNorm1d(2)
    model.register_buffer("mask", torch.ones(1).expand(3))
    model.register_buffer("replaced", torch.zeros(2))
    held = model.replaced
    start = WindowStart(model)
    start.keep()
    expected = random.random(), torch.rand(2)
    model(torch.randn(4, 2))
    model.replaced = torch.ones(2)
    held.add_(1)
    start.put_back()
    assert model.replaced is held
    assert torch.equal(held, torch.zeros(2))
    assert model.num_batches_tracked == 0
    assert model.running_mean is not None
    assert torch.equal(model.running_mean, torch.zeros(2))
    assert random.random() == expected[0]
    assert torch.equal(torch.rand(2), expected[1])


def test_a_model_that_moved_is_followed() -> None:
    """Buffers that another dtype or device made new are kept from the next window on."""
    model = nn.BatchNorm1d(2)
    start = WindowStart(model)
    start.keep()
    model.double()
    start.keep()
    model(torch.randn(4, 2, dtype=torch.float64))
    start.put_back()
    assert model.running_mean is not None
    assert torch.equal(model.running_mean, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])  # the global generators are the subject
@pytest.mark.parametrize("first", [0, 1, LOOK_EVERY])
def test_generators_outside_of_torch_are_put_back_once_seen(draw: Callable[[], float], first: int) -> None:
    """A window that draws is noticed where it is looked at; every one after it is put back exactly."""
    generators = KeptGenerators()
    noticed = first if first % LOOK_EVERY == 0 else LOOK_EVERY
    for window in range(noticed + 3):
        generators.keep()
        if window >= first:
            drawn = draw()
            if window == first or window > noticed:
                generators.put_back()
                assert (draw() == drawn) == (window > noticed or first == noticed)
        generators.end()
