"""Batches as loaders give them are counted and cut along their first dimension."""

from __future__ import annotations

from collections import UserDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch

from autobatch import UsageError
from autobatch.training.batches import batch_size, split_batch

Pair = namedtuple("Pair", ["x", "y"])  # noqa: PYI024 - as collate functions make them
X = torch.arange(10).reshape(5, 2)


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, X),
        [X, X],
        {"x": X, "scale": 2.0, "none": None},
        Pair(X, X),
        UserDict(x=X),
        defaultdict(list, x=X),
        X.numpy(),
        (X.numpy(), X),
        [X, {"y": X}, "text"],
        list("abcde"),
    ],
)
def test_counted_and_cut(batch: Any) -> None:
    """Five samples in pieces of 3 and 2, of the same form."""
    assert batch_size(batch) == 5
    pieces = split_batch(batch, (3, 2))
    assert [batch_size(piece) for piece in pieces] == [3, 2]
    assert all(type(piece) is type(batch) for piece in pieces)


def test_pieces_are_views() -> None:
    """In order and without a copy."""
    first, second = split_batch((X,), (3, 2))
    assert first[0].data_ptr() == X.data_ptr()
    assert torch.equal(torch.cat([first[0], second[0]]), X)


@pytest.mark.parametrize(("batch", "message"), [(3, "has no tensor to count"), ((X, X[:2]), "have 2, 5 samples")])
def test_what_cannot_be_counted(batch: Any, message: str) -> None:
    """Names what is missing or differs, and the way out."""
    with pytest.raises(UsageError, match=message):
        batch_size(batch)
