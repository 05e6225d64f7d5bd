"""Candidates in order: what fits, what does not and by how much, what cannot be planned, what is unknown."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from service_fakes import GIB, make_report, make_trial

from autobatch.store import NewMeasurement

if TYPE_CHECKING:
    from service_fakes import RunningService

    from autobatch import Report


def keep(service: RunningService, report: Report, gpu: str) -> None:
    new = NewMeasurement.of(report, workload="gpt2", gpu=gpu, source="reported")
    service.services.measurements.add(new, token_id=None)


def rank(service: RunningService, *candidates: dict[str, Any], **request: Any) -> list[dict[str, Any]]:
    body = {"workload": "gpt2", "target": 256, "candidates": list(candidates), **request}
    response = service.client.post("/v1/placements", json=body)
    assert response.status_code == 200, response.text
    placements: list[dict[str, Any]] = response.json()["placements"]
    assert [one["rank"] for one in placements] == list(range(1, len(candidates) + 1))
    return placements


def order(placements: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(one["gpu"], one["count"]) for one in placements]


@pytest.fixture
def stocked(service: RunningService) -> RunningService:
    """37 fit on an A100, 16 on an L4, nothing on a T4; of an H100 nothing is known."""
    keep(service, make_report(largest=37), "A100-SXM4-40GB")
    keep(service, make_report(largest=16, gpu="L4"), "L4")
    keep(service, make_report(largest=None, gpu="T4"), "T4")
    return service


def test_what_fits_comes_first_then_what_does_not_then_no_plan_then_the_unknown(stocked: RunningService) -> None:
    """Each with its verdict and its reason."""
    found = rank(
        stocked,
        {"gpu": "H100"}, {"gpu": "L4", "count": 3}, {"gpu": "T4"}, {"gpu": "L4", "count": 500}, {"gpu": "L4"},
    )  # fmt: skip
    assert [(one["gpu"], one["count"], one["verdict"]) for one in found] == [
        ("L4", 1, "fits"),
        ("T4", 1, "does_not_fit"),
        ("L4", 3, "no_plan"),
        ("L4", 500, "no_plan"),
        ("H100-SXM5-80GB", 1, "unknown"),
    ]
    fits, too_small, uneven, too_many, unknown = found
    assert fits["plan"]["micro_batch_sizes"] == [16] * 16
    assert fits["basis"] == "emulated"
    missing = 102 * GIB + GIB // 2 + GIB - 40 * GIB
    assert too_small["missing_bytes"] == missing
    assert f"about {missing} bytes too large" in too_small["reason"]
    assert "255 or 258" in uneven["reason"]
    assert "below the 500 cards" in too_many["reason"]
    assert "nothing has been measured" in unknown["reason"]
    assert [one["plan"] for one in found[1:]] == [None] * 4


def test_fewest_cards_come_first_then_the_cheaper_then_the_roomier(stocked: RunningService) -> None:
    """Ties are broken by the price of all cards, then by the memory left; one without a price comes last."""
    found = rank(
        stocked,
        {"gpu": "L4", "count": 2, "price_per_hour": 0.1}, {"gpu": "L4"}, {"gpu": "L4", "price_per_hour": 3},
        {"gpu": "A100-40GB", "price_per_hour": 2},
    )  # fmt: skip
    assert order(found) == [("A100-SXM4-40GB", 1), ("L4", 1), ("L4", 1), ("L4", 2)]
    assert [one["price_per_hour"] for one in found] == [2, 3, None, 0.2]
    both = rank(stocked, {"gpu": "A100-40GB"}, {"gpu": "L4"})
    assert order(both) == [("L4", 1), ("A100-SXM4-40GB", 1)]
    assert both[0]["headroom_bytes"] > both[1]["headroom_bytes"]


def test_cost_is_that_of_all_cards_and_what_has_none_says_so(stocked: RunningService) -> None:
    """Two cheap cards cost more than one dear one."""
    found = rank(
        stocked,
        {"gpu": "L4", "count": 2, "price_per_hour": 2}, {"gpu": "A100-40GB", "price_per_hour": 3.5}, {"gpu": "L4"},
        rank_by="cost",
    )  # fmt: skip
    assert order(found) == [("A100-SXM4-40GB", 1), ("L4", 2), ("L4", 1)]
    assert "it has no price" in found[2]["reason"]
    assert "no price" not in found[0]["reason"] + found[1]["reason"]


def test_throughput_ranks_what_real_cards_were_timed_at(stocked: RunningService) -> None:
    """Emulated ones know no time: they come after, and say so."""
    timed = dataclasses.replace(
        make_trial(8, fits=True, steps=2), seconds_per_step=0.2, seconds_per_step_end=0.1, timed_steps=2
    )  # fmt: skip
    real = dataclasses.replace(
        make_report(target=16, largest=8, gpu="RTX-3090", basis="measured"), trials=(timed, make_trial(9, fits=False))
    )
    keep(stocked, real, "RTX-3090")
    candidates: list[dict[str, Any]] = [{"gpu": "L4"}, {"gpu": "RTX-3090"}, {"gpu": "RTX-3090", "count": 4}]
    found = rank(stocked, *candidates, rank_by="throughput")
    assert order(found) == [("RTX-3090", 4), ("RTX-3090", 1), ("L4", 1)]
    assert found[1]["samples_per_second"] == pytest.approx(256 / (32 * 0.05 + 0.1))
    assert found[2]["samples_per_second"] is None
    assert "no real card was timed" in found[2]["reason"]


def test_headroom_ranks_by_the_memory_that_is_left(stocked: RunningService) -> None:
    """Of one card."""
    found = rank(
        stocked, {"gpu": "A100-40GB"}, {"gpu": "L4", "count": 2}, {"gpu": "L4", "count": 64}, rank_by="headroom"
    )
    left = [one["headroom_bytes"] for one in found]
    assert left == sorted(left, reverse=True)
    assert order(found)[-1] == ("A100-SXM4-40GB", 1)


def test_the_order_of_equals_is_the_order_in_which_they_were_sent(stocked: RunningService) -> None:
    """Also of the same candidate sent twice, under two names."""
    found = rank(stocked, {"gpu": "nvidia_l4"}, {"gpu": "H100"}, {"gpu": "NVIDIA-L4"}, {"gpu": "B200"})
    assert order(found) == [("L4", 1), ("L4", 1), ("H100-SXM5-80GB", 1), ("B200", 1)]


def test_a_hundred_candidates_of_one_card_look_it_up_once(stocked: RunningService) -> None:
    """More are refused; each is answered with its own count."""
    asked: list[tuple[str, str]] = []
    measurements = stocked.services.measurements
    series = measurements.series
    measurements.series = lambda workload, gpu: asked.append((workload, gpu)) or series(workload, gpu)  # type: ignore[method-assign, func-returns-value]
    found = rank(stocked, *({"gpu": "L4", "count": 1 + number % 64} for number in range(100)))
    assert len(found) == 100
    assert asked == [("gpt2", "L4")]
    body = {"workload": "gpt2", "target": 256, "candidates": [{"gpu": "L4"}] * 101}
    assert stocked.client.post("/v1/placements", json=body).status_code == 422


def test_a_plan_too_long_to_be_read_is_left_to_the_plan_query(stocked: RunningService) -> None:
    """A ranking of plans that list each of thousands of ranks would be as large as it is useless."""
    candidates = [{"gpu": "L4", "count": 6_000}, {"gpu": "L4", "count": 1}]
    few, many = rank(stocked, *candidates, target=6_001, split="balanced")
    assert few["count"] == 1
    assert few["plan"] is not None
    assert (many["verdict"], many["plan"]) == ("fits", None)
    assert "GET /v1/plan" in many["reason"]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"workload": "gtp2"}, 404, "unknown-workload"),
        ({"parameters": {"seq_len": 0}}, 422, "bad-parameter"),
        ({"candidates": [{"gpu": "A100"}]}, 422, "ambiguous-gpu"),
        ({"candidates": [{"gpu": "L4"}, {"gpu": "L5"}]}, 404, "unknown-gpu"),
        ({"candidates": []}, 422, "invalid-request"),
        ({"candidates": [{"gpu": "L4", "count": 0}]}, 422, "invalid-request"),
        ({"candidates": [{"gpu": "L4", "price_per_hour": -1}]}, 422, "invalid-request"),
        ({"rank_by": "luck"}, 422, "invalid-request"),
        ({"split": "odd"}, 422, "invalid-request"),
    ],
)
def test_a_request_that_means_nothing_is_refused(service: RunningService, change: Any, status: int, code: str) -> None:
    """As a whole: there is no ranking of some of what was asked."""
    body = {"workload": "gpt2", "target": 256, "candidates": [{"gpu": "L4"}], **change}
    response = service.client.post("/v1/placements", json=body)
    assert (response.status_code, response.json()["code"]) == (status, code)
