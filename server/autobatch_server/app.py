"""The application: routes behind their guard, with the runner beside them."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from fastapi import FastAPI

from autobatch import __version__
from autobatch_server.guard import Guard
from autobatch_server.openapi import describe_interface
from autobatch_server.problems import install_problem_handlers
from autobatch_server.remembered import RememberedAnswers
from autobatch_server.routes import admission, catalogue, docs, health, measurements, page, plans, probes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from autobatch_server.runner import Runner
    from autobatch_server.services import Services

__all__ = ["create_app"]


def create_app(services: Services, *, runner: Runner | None = None) -> FastAPI:
    """Make the application.

    Args:
        services: what the routes stand on; closed by whoever opened them.
        runner: what runs probes in this process, to be told of what comes; None where others run them.

    Returns:
        An ASGI application.
    """
    settings = services.settings

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.closing.set()

    app = FastAPI(
        title="autobatch",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # these have routes of their own, behind the same tokens as all others
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
        redirect_slashes=False,  # an address has one spelling, and no answer is made from the Host header
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.services = services
    app.state.closing = threading.Event()
    app.state.notify = runner.notify if runner is not None else _nobody_to_notify
    for module in (plans, measurements, catalogue, probes, admission, health, docs, page):
        app.include_router(module.router)
    install_problem_handlers(app)
    app.add_middleware(RememberedAnswers, services=services)
    hosts = [*settings.allowed_hosts, *([] if settings.is_loopback else [settings.host])]
    app.add_middleware(Guard, hosts=hosts, body_limit_bytes=settings.body_limit_bytes, metrics=services.metrics)
    app.openapi = lambda: describe_interface(app)  # type: ignore[method-assign] # FastAPI's own way to complete its document
    return app


def _nobody_to_notify() -> None:
    """No runner in this process: others look by themselves."""
