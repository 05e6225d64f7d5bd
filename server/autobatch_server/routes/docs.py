"""`/docs` and `/openapi.json`: the interface described, from files of this machine, behind the same tokens."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response

from autobatch_server.problems import ProblemError
from autobatch_server.routes.parts import Reader

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

# Swagger UI's files, as the package fastapi-offline carries them: nothing is fetched from another host.
_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}


@router.get("/openapi.json")
def openapi(http: Request, principal: Reader) -> JSONResponse:
    """The OpenAPI document."""
    del principal
    return JSONResponse(http.app.openapi())


@router.get("/docs")
def docs(http: Request, principal: Reader) -> Response:
    """Swagger UI."""
    del principal
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=f"{http.app.title} {http.app.version}",
        swagger_js_url="/docs/static/swagger-ui-bundle.js",
        swagger_css_url="/docs/static/swagger-ui.css",
        swagger_favicon_url="/docs/static/favicon.png",
    )
    text = bytes(page.body).decode()
    scripts = " ".join(
        f"'sha256-{_digest(script)}'" for script in re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    )
    # Swagger UI sets styles by itself; the only inline script is the one that starts it, known by its hash.
    policy = (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@router.get("/docs/static/{name}")
def docs_file(name: str, principal: Reader) -> Response:
    """One of Swagger UI's files."""
    del principal
    if name not in _FILES:
        raise ProblemError("not-found", "there is no such file")
    content = (importlib.resources.files("fastapi_offline") / "static" / name).read_bytes()
    return Response(content, media_type=_FILES[name], headers={"Cache-Control": "private, max-age=3600"})
