"""An answer is remembered for as long as nothing changed, whoever changes it; its ETag spares the sending."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from service_fakes import FakeExecutor, make_report, make_settings, running_service, succeeding

from autobatch import SizeFailure
from autobatch.store import MeasurementStore, NewMeasurement
from autobatch_server.database import open_database
from autobatch_server.services import AnswerCache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service_fakes import RunningService

QUERY = "/v1/plan?workload=gpt2&gpu=A100-40GB&target=256"


def new(largest: int | None, **values: Any) -> NewMeasurement:
    return NewMeasurement.of(
        make_report(largest=largest, **values), workload="gpt2", gpu="A100-SXM4-40GB", source="reported"
    )


def plan_of(service: RunningService, query: str = QUERY) -> tuple[str, int | None]:
    """Verdict and micro-batch, asked for twice: from the database, then from memory."""
    first, second = service.client.get(query), service.client.get(query)
    assert (first.status_code, first.content, first.headers["etag"]) == (200, second.content, second.headers["etag"])
    answer = first.json()
    return answer["verdict"], answer["plan"] and answer["plan"]["micro_batch_size"]


@pytest.fixture
def service_and_other_store(tmp_path: Path) -> Iterator[tuple[RunningService, MeasurementStore]]:
    """A service, and the measurements of its database as another process has them."""
    settings = make_settings(tmp_path, run_probes=False)
    with (
        running_service(settings, executor=FakeExecutor(succeeding)) as service,
        open_database(settings.database_url) as elsewhere,
    ):
        yield service, MeasurementStore(elsewhere)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in another process"])
def test_every_change_shows_in_the_next_answer(
    service_and_other_store: tuple[RunningService, MeasurementStore], elsewhere: bool
) -> None:
    """A measurement, an error reported, a newer series, each forgotten again: no answer outlives what it stood on."""
    service, other = service_and_other_store
    store = other if elsewhere else service.services.measurements
    assert plan_of(service) == ("unknown", None)
    first = store.add(new(37), token_id=None)
    assert plan_of(service) == ("fits", 32)
    oom = store.add_oom(
        SizeFailure(micro_batch_size=32, micro_batches_per_step=2),
        workload="gpt2", gpu="A100-SXM4-40GB", measurement_id=first.id, after_plan=True, token_id=None,
    )  # fmt: skip
    assert plan_of(service) == ("fits", 16)
    assert store.delete(oom.id)
    assert plan_of(service) == ("fits", 32)
    second = store.add(new(9, torch="2.16"), token_id=None)
    assert plan_of(service) == ("fits", 8)
    assert store.delete(second.id)
    assert plan_of(service) == ("fits", 32)
    assert store.delete(first.id)
    assert plan_of(service) == ("unknown", None)


def test_a_known_answer_is_not_sent_again(service: RunningService) -> None:
    """Weak comparison, lists and `*`, from memory and from the database; another tag gets the answer."""
    service.services.measurements.add(new(37), token_id=None)
    tag = service.client.get(QUERY).headers["etag"]
    assert tag.startswith('"')
    for known in (tag, f"W/{tag}", f'"other", {tag}', f'W/"other",W/{tag}', "*"):
        for query in (QUERY, f"{QUERY}&split=even&tolerance=0.{'0' * len(known)}"):
            response = service.client.get(query, headers={"If-None-Match": known})
            assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag), known
    for known in ('"other"', tag.strip('"'), 'W/"other"', ""):
        assert service.client.get(QUERY, headers={"If-None-Match": known}).status_code == 200, known


def test_the_tag_changes_with_the_answer_and_only_with_it(service: RunningService) -> None:
    """A measurement of another job changes nothing; one of this job does, and the old tag gets the new answer."""
    service.services.measurements.add(new(37), token_id=None)
    tag = service.client.get(QUERY).headers["etag"]
    other = make_report(largest=5, gpu="L4")
    service.services.measurements.add(
        NewMeasurement.of(other, workload="gpt2", gpu="L4", source="reported"), token_id=None
    )  # fmt: skip
    assert service.client.get(QUERY, headers={"If-None-Match": tag}).status_code == 304
    service.services.measurements.add(new(20, torch="2.16"), token_id=None)
    changed = service.client.get(QUERY, headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag


def test_queries_that_differ_have_answers_of_their_own(service: RunningService) -> None:
    """Target, world size, split, multiple, tolerance and basis each count."""
    service.services.measurements.add(new(37), token_id=None)
    assert plan_of(service) == ("fits", 32)
    assert plan_of(service, QUERY.replace("256", "111")) == ("fits", 37)
    assert plan_of(service, f"{QUERY}&world_size=2") == ("fits", 32)
    assert plan_of(service, f"{QUERY}&split=balanced") == ("fits", 37)
    assert plan_of(service, f"{QUERY}&multiple_of=37&tolerance=0.02") == ("fits", 37)
    assert plan_of(service, f"{QUERY}&basis=measured") == ("unknown", None)
    assert plan_of(service, f"{QUERY}&basis=emulated") == ("fits", 32)


def test_what_is_remembered_has_an_end() -> None:
    """The oldest answers go; a large one is not kept at all, nor one made from what has changed since."""
    cache = AnswerCache()
    body = b"x" * 8_000
    assert cache.get(1, b"0") is None
    for number in range(3000):
        cache.put(1, str(number).encode(), body, "tag", "fits")
    kept = [number for number in range(3000) if cache.get(1, str(number).encode())]
    assert kept == list(range(3000 - len(kept), 3000))
    assert 2_090 <= len(kept) <= 2_100
    cache.put(1, b"large", b"x" * 9_000, "tag", "fits")
    cache.put(1, b"q" * 2_000, b"", "tag", "fits")
    cache.put(0, b"stale", b"", "tag", "fits")
    assert cache.get(1, b"large") is cache.get(1, b"stale") is cache.get(1, b"q" * 2_000) is None
    assert cache.get(2, b"399") is None
