"""Ask the service which cards fit: the ranking of `autobatch rank`, from what was measured, without a probe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch.client import ServiceClient
from autobatch.errors import AutobatchError, UnavailableError
from autobatch.jsonform import from_json_form
from autobatch.placement import PlacementTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.placement import Candidate, RankBy
    from autobatch.plan import Split

__all__ = ["ask_placements"]


def ask_placements(
    *,
    url: str,
    token: str | None,
    workload: str,
    target: int,
    candidates: Sequence[Candidate],
    split: Split = "even",
    rank_by: RankBy = "gpus",
) -> PlacementTable:
    """Ask for candidates in order.

    Args:
        url: the service's address, like `http://scheduler:8000`.
        token: a bearer token with the scope `plan:read`; None where the service asks for none.
        workload: the service's name for the job, with parameters as in `gpt2?seq_len=512`.
        target: samples per optimizer step over all cards.
        candidates: cards by any of their names, up to 100.
        split: `even` or `balanced`.
        rank_by: what comes first among those that fit.

    Returns:
        The table; its placements have no reports.

    Raises:
        UsageError: the address is none.
        UnavailableError: the service is not there, or refuses the question; the message says why.
    """
    client = ServiceClient(url=url, token=token, flag="--from", scope="plan:read")
    question: dict[str, object] = {
        "workload": workload,
        "target": target,
        "split": split,
        "rank_by": rank_by,
        "candidates": [_form_of(one) for one in candidates],
    }
    answer = client.ask("POST", "/v1/placements", question)
    try:
        return from_json_form(PlacementTable, answer)
    except AutobatchError as error:
        raise UnavailableError(f"the answer of the service at {url} cannot be read: {error}") from None


def _form_of(candidate: Candidate) -> dict[str, Any]:
    form: dict[str, Any] = {"gpu": candidate.gpu, "count": candidate.count}
    if candidate.price_per_hour is not None:
        form["price_per_hour"] = candidate.price_per_hour
    return form
