"""The OpenAPI document: what FastAPI tells of the routes, and what it does not: headers, errors of every route, examples."""

from __future__ import annotations

import importlib.resources
import json
from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi

from autobatch_server.problems import ProblemDocument, problem_responses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

__all__ = ["describe_interface"]

_DESCRIPTION = """\
Which batch fits where, for job schedulers. The **query plane** answers from stored measurements in milliseconds and never
touches a GPU; the **operation plane** runs probes. Every error is a problem document (RFC 9457) with a stable `code`; an address
that is not here is answered with `not-found`, another method than those listed with `method-not-allowed` and an `Allow` header.

Bodies are I-JSON (RFC 7493): UTF-8, no name twice in an object, integers up to 2^53 - 1.
A body with `GET` is dropped.
"""
_LARGEST_INTEGER = 2**53 - 1  # as the reading of bodies has it
_REFERENCE = "#/components/schemas/{model}"


def describe_interface(app: FastAPI) -> dict[str, Any]:
    """Make the OpenAPI document, once for each application."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
        _complete(document)
        app.openapi_schema = document
    return app.openapi_schema


def _complete(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["ProblemDocument"] = ProblemDocument.model_json_schema(ref_template=_REFERENCE)
    # Every route answers 422 with a problem document; FastAPI's own form is never sent.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for name in ("Cached", "Device", "Memory", "Plan", "ProbeOptions", "RankResult", "Report", "Trial", "Versions"):
        # The library's own forms: what a later version of it adds is ignored where it is sent here.
        schemas[name].pop("additionalProperties", None)
    for schema in _integers_of([schemas, document["paths"]]):
        if "maximum" not in schema:
            schema |= {"minimum": schema.get("minimum", -_LARGEST_INTEGER), "maximum": _LARGEST_INTEGER}
    for name, examples in _examples().items():
        schemas[name]["examples"] = examples
    components["headers"] = {
        "X-Request-Id": {
            "description": "names this request in the service's log",
            "required": True,
            "schema": {"type": "string", "pattern": "^req_[0-9a-f]{24}$"},
        }
    }
    components["responses"] = {"method-not-allowed": _method_not_allowed()}
    for operation in _operations(document):
        # Without this an operation would be taken for one that asks for what the whole document asks for.
        operation.setdefault("security", [])
        for response in operation["responses"].values():
            response.setdefault("headers", {})["X-Request-Id"] = {"$ref": "#/components/headers/X-Request-Id"}


def _integers_of(value: Any) -> Iterator[dict[str, Any]]:
    """Every schema of an integer in there."""
    if isinstance(value, dict):
        if value.get("type") == "integer":
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _integers_of(part)


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def _method_not_allowed() -> dict[str, Any]:
    response: dict[str, Any] = problem_responses("method-not-allowed")[405]
    response["headers"] = {
        "Allow": {"description": "the methods that this address takes", "required": True, "schema": {"type": "string"}}
    }
    return response


def _examples() -> dict[str, list[Any]]:
    """Bodies as the service takes and gives them, by the name of their form."""
    text = importlib.resources.files("autobatch_server").joinpath("examples.json").read_text(encoding="utf-8")
    examples: dict[str, list[Any]] = json.loads(text)
    return examples
