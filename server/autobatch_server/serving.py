"""Bring the service up, and down again in order."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

import uvicorn

from autobatch import UnavailableError, UsageError
from autobatch_server.app import create_app
from autobatch_server.database import open_database
from autobatch_server.logs import configure_logging
from autobatch_server.services import open_services

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from fastapi import FastAPI

    from autobatch_server.execution import Executor
    from autobatch_server.services import Services
    from autobatch_server.settings import Settings

__all__ = ["IDLE_SECONDS", "serve"]

IDLE_SECONDS = 75
"""After how long an idle connection is closed. Clients and proxies drop theirs sooner (5 s in httpx, 60 s in common load
balancers): where both ends wait equally long, a request now and then meets a connection that is just being closed."""

_LOG = logging.getLogger(__name__)
_LAST_REQUESTS_SECONDS = 10
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(settings: Settings, *, executor: Executor | None = None) -> int:
    """Serve until a signal ends it.

    Args:
        settings: what the operator set.
        executor: what starts runs, in place of child processes.

    Returns:
        The exit status: 0 after SIGINT or SIGTERM.

    Raises:
        UsageError: the address is not a loopback one and no token exists, or the database cannot be opened.
        UnavailableError: the address cannot be listened on.
    """
    configure_logging(settings.log_level)
    with open_database(settings.database_url) as database, open_services(settings, database) as services:
        if not settings.is_loopback and settings.serve_http and not services.tokens.exist():
            raise UsageError(
                f"address {settings.host} is not a loopback one and no token exists, so anyone could ask: make one with "
                "`autobatch token create` first, or take --host 127.0.0.1"
            )
        if settings.serve_http:
            return _serve_http(services, executor)
        return _run_alone(services, executor)


def _serve_http(services: Services, executor: Executor | None) -> int:
    settings = services.settings
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(settings.host, settings.port))
        # Before anybody is told that the service is there; a Ray cluster that is not ends it here, in a line.
        runner = stack.enter_context(services.running(executor)) if settings.run_probes else None
        app = create_app(services, runner=runner)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        sys.stderr.write(
            f"autobatch: serving on http://{shown}:{port} (the API is described at /docs); Ctrl-C ends it\n"
        )
        sys.stderr.flush()
        configuration = uvicorn.Config(
            app,
            http="h11",  # strict about what two parsers might read in two ways
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_REQUESTS_SECONDS,
            timeout_keep_alive=IDLE_SECONDS,
            proxy_headers=False,
        )
        server = _Server(configuration, app)
        try:
            server.run(sockets=[listening])
        except SystemExit:  # uvicorn's way to say that the application did not start
            raise UnavailableError("the service did not start; its log, above, says why") from None
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnavailableError(
            f"cannot listen on {host} port {port}: {reason}; take another --port or --host"
        ) from None


class _Server(uvicorn.Server):
    """A server that tells streams and waiting polls to end before it waits for them."""

    def __init__(self, configuration: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(configuration)
        self._app = app

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Begin to shut down at a signal, and end as one that was asked to: not, as is uvicorn's way, by the signal."""
        with _handling(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down."""
        self._app.state.closing.set()
        super().handle_exit(sig, frame)


def _run_alone(services: Services, executor: Executor | None) -> int:
    """Run probes without answering HTTP, until a signal comes."""
    if not services.settings.run_probes:
        raise UsageError("serve_http and run_probes are both false: there is nothing to do")
    ended = threading.Event()
    with _handling(lambda _number, _frame: ended.set()), services.running(executor) as runner:
        _LOG.info("running probes without answering HTTP", extra={"runner": runner.id})
        while not ended.wait(1.0):
            pass
    return 0


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle what asks a process to end; what it was started to ignore, as by nohup, stays ignored."""
    numbers = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
