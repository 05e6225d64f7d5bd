"""What several routes share: the services, who asks, and the problems that any of them has."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from autobatch_server.access import Principal, require
from autobatch_server.services import Services

__all__ = ["BODY_PROBLEMS", "COMMON_PROBLEMS", "JSON_PROBLEMS", "Administrator", "Prober", "Reader", "Served"]


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Served = Annotated[Services, Depends(_services)]
Reader = Annotated[Principal, Depends(require("plan:read"))]
Prober = Annotated[Principal, Depends(require("probe:write"))]
Administrator = Annotated[Principal, Depends(require("admin"))]

COMMON_PROBLEMS = ("bad-http", "unauthenticated", "forbidden", "host-refused", "store-unavailable", "internal-error")
"""What any route answers with where something is wrong."""
BODY_PROBLEMS = ("body-too-slow", "body-too-large", "body-too-deep", "malformed-json", "origin-refused")
"""What any route answers with that changes something."""
JSON_PROBLEMS = (*BODY_PROBLEMS, "unsupported-media-type", "invalid-request")
"""What any route answers with that reads a body."""
