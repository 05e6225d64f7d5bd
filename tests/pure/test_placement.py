"""Candidates and their order, and where a search begins from what other cards showed."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from service_fakes import GIB, make_report, make_trial

from autobatch import Candidate, Placement, UsageError
from autobatch.jsonform import from_json_form, to_json_form
from autobatch.placement import (
    PlacementTable,
    first_size_on,
    headroom_left,
    in_order,
    parse_candidate,
    parse_price,
    placement_key,
)


def placement(**more: Any) -> Placement:
    return Placement(
        **{
            "rank": 0,
            "gpu": "L4",
            "count": 1,
            "verdict": "fits",
            "reason": "",
            "plan": None,
            "basis": "emulated",
            "price_per_hour": None,
            "headroom_bytes": None,
            "missing_bytes": None,
            "report": None,
            **more,
        }
    )


CHEAP = placement(gpu="L4", count=4, price_per_hour=2.4, headroom_bytes=3)
DEAR = placement(gpu="H100-SXM5-80GB", price_per_hour=9.0, headroom_bytes=2)
ROOMY = placement(gpu="B200", headroom_bytes=50)
TOO_SMALL = placement(gpu="T4", verdict="does_not_fit", price_per_hour=0.1)
INDIVISIBLE = placement(gpu="A10", count=7, verdict="no_plan")
UNKNOWN = placement(gpu="V100-SXM2-16GB", verdict="unknown", price_per_hour=0.01)


@pytest.mark.parametrize(
    ("rank_by", "expected"),
    [("gpus", [DEAR, ROOMY, CHEAP]), ("cost", [CHEAP, DEAR, ROOMY]), ("headroom", [ROOMY, CHEAP, DEAR])],
)
def test_what_fits_comes_first_and_what_has_no_figure_last(rank_by: Any, expected: list[Placement]) -> None:
    """In whatever order they are given."""
    for given_order in itertools.permutations([CHEAP, DEAR, ROOMY, TOO_SMALL, INDIVISIBLE, UNKNOWN], 6):
        ordered = in_order(given_order, rank_by)
        assert [one.gpu for one in ordered] == [one.gpu for one in (*expected, TOO_SMALL, INDIVISIBLE, UNKNOWN)]
        assert [one.rank for one in ordered] == [1, 2, 3, 4, 5, 6]


def test_times_order_where_there_are_any() -> None:
    """As the service has them."""
    same: dict[str, Any] = {"verdict": "fits", "rank_by": "throughput", "price_per_hour": None, "headroom_bytes": None}
    fast = placement_key(count=8, samples_per_second=90.0, **same)
    slow = placement_key(count=1, samples_per_second=10.0, **same)
    untimed = placement_key(count=1, samples_per_second=None, **same)
    assert fast < slow < untimed


def test_the_table_survives_its_json_form() -> None:
    """Reports and plans within it too."""
    report = make_report(largest=32)
    entry = placement(report=report, plan=report.plan, headroom_bytes=headroom_left(report), rank=1)
    table = PlacementTable(
        workload="gpt2", target=256, rank_by="gpus", placements=(entry, placement(verdict="unknown"))
    )
    assert from_json_form(PlacementTable, to_json_form(table)) == table


@given(budget=st.integers(1, 200 * GIB), per_sample=st.integers(1, GIB))
def test_between_sizes_that_ran_the_size_that_fills_a_card_is_read_off(budget: int, per_sample: int) -> None:
    """Exact where memory is linear and two sizes are known, between them and beyond."""
    smaller = make_trial(8, fits=True, bytes_per_sample=per_sample)
    report = dataclasses.replace(
        make_report(largest=64, target=10**7),
        trials=(smaller, make_trial(64, fits=True, bytes_per_sample=per_sample)),
    )
    first = first_size_on(budget, [report])
    assert first is not None
    assert first >= 1
    if budget >= smaller.footprint_bytes:
        room = budget - (smaller.footprint_bytes - 8 * per_sample)
        assert first == pytest.approx(room / per_sample, abs=1 + 1e-9 * room / per_sample)


def test_nothing_is_proposed_where_nothing_fitted() -> None:
    """A failure on one card says little of another."""
    assert first_size_on(GIB, []) is None
    assert first_size_on(GIB, [make_report(largest=None)]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("L4", ("L4", 1)), ("A100-SXM4-40GB:8", ("A100-SXM4-40GB", 8)), (" rtx 4090 : 2 ", ("rtx 4090", 2))],
)
def test_a_candidate_is_read(text: str, expected: tuple[str, int]) -> None:
    """A name, or a name and a count."""
    found = parse_candidate(text)
    assert (found.gpu, found.count) == expected


@pytest.mark.parametrize("text", ["", ":4", "L4:", "L4:x", "L4:-1", "L4:1.5", "L4:²", "L4:" + "9" * 5000])
def test_what_is_no_candidate_is_refused(text: str) -> None:
    """With what would be one."""
    with pytest.raises(UsageError, match="write L4, or L4:4 for four of them"):
        parse_candidate(text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"count": 0}, "count of L4 0 is below 1"),
        ({"count": 10**7}, "count of L4 10000000 is above 1000000"),
        ({"price_per_hour": -1.0}, "price of L4 -1.0 is not a price"),
        ({"price_per_hour": float("nan")}, "price of L4 nan is not a price"),
        ({"price_per_hour": 1e308, "count": 4}, r"price of L4 1e\+308 times 4 cards is above 1e\+15"),
        ({"price_per_hour": True}, "price of L4 True is not a price"),
    ],
)
def test_counts_and_prices_without_meaning_are_refused(more: dict[str, Any], message: str) -> None:
    """Both numbers are named."""
    with pytest.raises(UsageError, match=message):
        Candidate(gpu="L4", **more)


@pytest.mark.parametrize("text", ["L4", "L4=", "=1", "L4=x", "L4=-1", "L4=inf", "L4=nan"])
def test_what_is_no_price_is_refused(text: str) -> None:
    """With what would be one."""
    assert parse_price("L4=0.60") == ("L4", 0.6)
    with pytest.raises(UsageError, match=r"write L4=0\.60"):
        parse_price(text)
