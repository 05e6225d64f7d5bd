"""Ask the service which cards fit: the ranking of `autobatch rank`, from what was measured, without a probe."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from autobatch.client import ServiceClient
from autobatch.errors import AutobatchError, UnavailableError, UsageError
from autobatch.gpu.catalogue import find_card
from autobatch.jsonform import from_json_form
from autobatch.placement import PlacementTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.placement import Candidate, RankBy
    from autobatch.plan import Split

__all__ = ["ask_placements"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


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
        table = from_json_form(PlacementTable, _printable(answer))
        _check_that_it_answers(table, target, candidates)
    except AutobatchError as error:
        raise UnavailableError(f"the answer of the service at {url} cannot be used: {error}") from None
    return table


def _check_that_it_answers(table: PlacementTable, target: int, candidates: Sequence[Candidate]) -> None:
    """Hold an answer against its question: what is printed goes into command lines and environments.

    Raises:
        UsageError: it is of other cards, of another target, or contradicts itself.
    """
    asked = Counter((find_card(one.gpu).name, one.count) for one in candidates)
    if Counter((one.gpu, one.count) for one in table.placements) != asked:
        raise UsageError(
            f"it names {len(table.placements)} placements, which are not those of the {len(candidates)} asked for"
        )
    for one in table.placements:
        if one.plan is not None and (one.plan.target, one.plan.world_size) != (target, one.count):
            raise UsageError(
                f"its plan for {one.gpu} is of target {one.plan.target} over {one.plan.world_size} ranks, asked was {target} "
                f"over {one.count}"
            )
        if one.measurement is not None and not _ID.fullmatch(one.measurement):
            raise UsageError(f"measurement {one.measurement!r} is no id")


def _printable(value: Any) -> Any:
    """The same without signs that a terminal or a shell would act upon."""
    if isinstance(value, str):
        return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in value)
    if isinstance(value, dict):
        return {key: _printable(one) for key, one in value.items()}
    return [_printable(one) for one in value] if isinstance(value, list) else value


def _form_of(candidate: Candidate) -> dict[str, Any]:
    form: dict[str, Any] = {"gpu": candidate.gpu, "count": candidate.count}
    if candidate.price_per_hour is not None:
        form["price_per_hour"] = candidate.price_per_hour
    return form
