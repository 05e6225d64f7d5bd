"""Whose the memory at a peak is: replayed from what an allocator gave and took back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.breakdown import AllocationEvent, MemoryBreakdown, find_peak
from autobatch.jsonform import from_json_form, to_json_form

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS = {
    "parameters": 1,
    "gradients": 2,
    "optimizer_state": 3,
    "other_held": 4,
    "activations": 5,
    "temporary": 6,
    "workspaces": 7,
    "unused": 8,
    "context": 9,
}


def breakdown(**changes: object) -> MemoryBreakdown:
    sizes = {f"{name}_bytes": size for name, size in PARTS.items()}
    return MemoryBreakdown(**{"window": (4, 4), "phase": "backward", **sizes, **changes})  # type: ignore[arg-type]


def test_the_parts_sum_to_the_footprint() -> None:
    assert breakdown().parts() == PARTS
    assert breakdown().footprint_bytes == 45
    assert breakdown().grows_bytes == 11


def test_it_survives_its_json_form() -> None:
    assert from_json_form(MemoryBreakdown, to_json_form(breakdown()), where="breakdown") == breakdown()


@pytest.mark.parametrize("wrong", [{"unused_bytes": -1}, {"window": ()}, {"window": (0,)}])
def test_what_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"below 0|not of sizes"):
        breakdown(**wrong)


def test_every_owner_is_told_at_the_peak() -> None:
    """A window of one micro-batch: its peak lies in the backward, before the activation is given back."""
    events = [
        AllocationEvent(20, 700),  # an activation
        AllocationEvent(30, 50, is_workspace=True),
        AllocationEvent(30, 0),
        AllocationEvent(40, 100, "backward"),  # a gradient
        AllocationEvent(50, 60, "backward"),
        AllocationEvent(60, 7, "backward", is_workspace=True),  # here is the peak
        AllocationEvent(20, 0, "backward"),
        AllocationEvent(70, 80, "step"),
    ]
    peak = find_peak({1: 100, 2: 200, 3: 5}, events, [(7, {1: "parameters", 2: "optimizer_state", 40: "gradients"})])
    assert peak.phase == "backward"
    assert peak.bytes_by_owner == {
        "parameters": 100,
        "optimizer_state": 200,
        "other_held": 5,
        "activations": 700,
        "gradients": 100,
        "temporary": 60,
        "workspaces": 7,
    }
    assert peak.total_bytes == 1172


def test_an_address_that_is_used_again_belongs_to_who_had_it_at_that_moment() -> None:
    """The gradient stands where an activation stood at the peak."""
    events = [AllocationEvent(9, 500), AllocationEvent(9, 0), AllocationEvent(9, 100, "backward")]
    peak = find_peak({}, events, [(3, {9: "gradients"})])
    assert (peak.phase, peak.bytes_by_owner) == ("forward", {"activations": 500})


def test_what_is_known_at_several_moments_counts() -> None:
    """Gradients that stood before the window, and were let go when the next ones were made."""
    events = [AllocationEvent(5, 900), AllocationEvent(1, 0), AllocationEvent(2, 100, "backward")]
    peak = find_peak({1: 100}, events, [(0, {1: "gradients"}), (3, {2: "gradients"})])
    assert peak.bytes_by_owner == {"gradients": 100, "activations": 900}


def test_nothing_happens() -> None:
    peak = find_peak({1: 10}, [], [(0, {1: "parameters"})])
    assert peak.bytes_by_owner == {"parameters": 10}


@st.composite
def histories(draw: st.DrawFn) -> tuple[dict[int, int], list[AllocationEvent]]:
    addresses = st.integers(1, 6)
    standing = draw(st.dictionaries(addresses, st.integers(1, 99), max_size=3))
    phases = st.sampled_from(["forward", "backward", "step"])
    events = st.builds(AllocationEvent, addresses, st.integers(0, 99), phases, st.booleans())
    return standing, draw(st.lists(events, max_size=30))


def highest_total(standing: dict[int, int], events: Sequence[AllocationEvent]) -> int:
    """The most in use, step by step."""
    live = dict(standing)
    totals = [sum(live.values())]
    for event in events:
        live[event.address] = event.size_bytes
        totals.append(sum(live.values()))
    return max(totals)


@given(histories(), st.integers(0, 30))
def test_the_parts_are_always_the_most_that_was_in_use(
    history: tuple[dict[int, int], list[AllocationEvent]], owned_at: int
) -> None:
    standing, events = history
    peak = find_peak(standing, events, [(owned_at, {1: "parameters", 2: "gradients"})])
    assert peak.total_bytes == highest_total(standing, events)
