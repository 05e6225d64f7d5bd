"""How ranks find each other, and what one hears that comes when the others have given up."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from autobatch import WorkloadError
from autobatch.ranks.link import RankLink


def link_of(rank: int, store: dist.HashStore, monkeypatch: pytest.MonkeyPatch) -> RankLink:
    """One of two ranks, which meet by this store."""
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    link = RankLink(0.2)
    link._store = store
    return link


def test_a_rank_that_comes_too_late_hears_that_the_others_gave_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, in the same words, rather than waiting for ranks that are gone."""
    store = dist.HashStore()
    with pytest.raises(WorkloadError, match=r"rank 1 did not come to the probe within 0\.2 s") as given_up:
        link_of(0, store, monkeypatch)._arrive()
    with pytest.raises(WorkloadError) as late:
        link_of(1, store, monkeypatch)._arrive()
    assert str(late.value) == str(given_up.value)


def test_who_decided_first_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that gives up as the last one arrives goes on with it."""
    store = dist.HashStore()
    first, last = (link_of(rank, store, monkeypatch) for rank in range(2))
    store.set("here/0", "")
    store.add("here", 1)
    last._arrive()
    assert first._decide("rank 1 did not come") == first._verdict(0.0) == "all are here"
