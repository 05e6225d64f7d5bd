"""`/docs` and `/openapi.json`: from this machine alone, under a policy that allows what they need and no more."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service_fakes import RunningService


def test_the_document_is_that_of_the_application(service: RunningService) -> None:
    """OpenAPI 3.1, with every address of `/v1`."""
    document = service.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert {"/v1/plan", "/v1/placements", "/v1/probes", "/v1/measurements", "/v1/workloads", "/v1/gpus"} <= set(
        document["paths"]
    )
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert document["components"]["securitySchemes"]["session"]["in"] == "cookie"
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_page_loads_from_here_alone(service: RunningService) -> None:
    """No address of another host; each file that it names is served, with its type."""
    page = service.client.get("/docs")
    assert page.status_code == 200
    named = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
    assert len(named) == 3
    for address in named:
        assert address.startswith("/docs/static/")
        loaded = service.client.get(address)
        assert loaded.status_code == 200
        assert loaded.content
    assert "http" not in page.text.replace("http-equiv", "")


def test_the_policy_names_the_one_script_by_its_hash(service: RunningService) -> None:
    """What starts Swagger UI is allowed; a script that somebody slips in is not."""
    page = service.client.get("/docs")
    policy = page.headers["content-security-policy"]
    scripts = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["script-src"] == f"'self' 'sha256-{digest}'"
    assert directives["default-src"] == directives["frame-ancestors"] == "'none'"
    assert directives["connect-src"] == "'self'"


def test_other_files_are_not_there(service: RunningService) -> None:
    """Only the three that the page needs."""
    for name in ("redoc.standalone.js", "swagger-ui-bundle.js.map", "__init__.py", "."):
        assert service.client.get(f"/docs/static/{name}").status_code == 404
