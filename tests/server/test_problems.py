"""Problem documents: one table, one form, nothing of the inside."""

from __future__ import annotations

import json
import re

import pytest
from fastapi import FastAPI
from starlette.requests import Request

from autobatch_server.bodies import BodyError, is_json, read_strictly
from autobatch_server.problems import (
    CODES,
    ProblemDocument,
    ProblemError,
    _as_problem,
    problem_response,
    problem_responses,
)
from autobatch_server.queue import QueueFullError


@pytest.mark.parametrize("code", CODES)
def test_every_code_makes_a_document(code: str) -> None:
    """With its own status, a type that is stable, and the headers that the status asks for."""
    response = problem_response(ProblemError(code, "what is wrong, and the way out"))
    document = ProblemDocument.model_validate(json.loads(bytes(response.body)))
    assert response.status_code == document.status == CODES[code].status
    assert document.type == f"urn:autobatch:problem:{code}"
    assert document.code == code
    assert response.media_type == "application/problem+json"
    assert ("retry-after" in response.headers) is (document.status in {429, 503})
    assert ("www-authenticate" in response.headers) is (document.status == 401)


def test_codes_are_for_programs() -> None:
    """Lower case, words joined by '-', of an error's status."""
    for name, code in CODES.items():
        assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name)
        assert 400 <= code.status < 600
        assert code.title


def test_a_problem_can_be_raised_and_caught_by_anyone() -> None:
    """Frameworks write to what they catch: its traceback is set, and a note may be added."""
    problem = ProblemError("not-found", "there is nothing")
    problem.__traceback__ = None
    problem.add_note("seen")
    with pytest.raises(ProblemError, match="not-found"):
        raise problem


def test_responses_of_one_status_are_described_together() -> None:
    """Each code of a status has its example, and a code that is named twice one."""
    described = problem_responses("invalid-request", "no-plan", "no-plan", "queue-full")
    assert list(described) == [422, 429]
    assert list(described[422]["content"]["application/problem+json"]["examples"]) == ["invalid-request", "no-plan"]
    assert "Retry-After" in described[429]["headers"]


def test_what_is_not_known_is_not_translated() -> None:
    """It goes on to the guard, which logs it; its text is never an answer."""
    request = Request({"type": "http", "method": "GET", "path": "/", "headers": [], "app": FastAPI()})
    error = KeyError("secret")
    with pytest.raises(KeyError):
        _as_problem(error, request)
    full = _as_problem(QueueFullError(7, 5, of_token=True), request)
    assert full.detail == "7 probes of this token are waiting, the limit is 5: try again later"


@pytest.mark.parametrize(
    ("kind", "json_or_not"),
    [
        ("application/json", True),
        ("Application/JSON ; charset=utf-8", True),
        ("application/problem+json", True),
        ("text/json", False),
        ("application/jsonx", False),
        ("application/x-www-form-urlencoded", False),
        ("text/plain; application/json", False),
        ("", False),
    ],
)
def test_a_content_type_is_json_or_not(kind: str, *, json_or_not: bool) -> None:
    """As FastAPI reads it."""
    assert is_json(kind) is json_or_not


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a": [1, -2.5e3, true, null, "\\u00e9\\ud83d\\ude00"]}', {"a": [1, -2500.0, True, None, "é😀"]}),
        (b"9007199254740991", 2**53 - 1),
        (b"-9007199254740991", 1 - 2**53),
        (b'"\\\\u0000"', "\\u0000"),
    ],
)
def test_json_that_means_the_same_to_all_is_read(body: bytes, value: object) -> None:
    """Pairs of surrogates, the largest integers, and text that only looks like an escape."""
    assert read_strictly(body) == value


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":1}',
        b"9007199254740992",
        b"-1" + b"0" * 17,
        b"1e309",
        b"NaN",
        b"-Infinity",
        b'"\\u0000"',
        b'["\\udc00"]',
        b'{"\\ud800":1}',
        b"\xff",
        b"{",
        b"",
    ],
)
def test_json_that_could_mean_two_things_is_refused(body: bytes) -> None:
    """Each by one sentence that repeats nothing of the body."""
    with pytest.raises(BodyError):
        read_strictly(body)
