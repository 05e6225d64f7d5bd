"""Whether the service is up on this machine: what health checks ask every few seconds, so little is imported for it."""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from autobatch import UnavailableError, UsageError

if TYPE_CHECKING:
    from autobatch_server.settings import Settings

__all__ = ["check"]

_CHECK_SECONDS = 5.0


def check(settings: Settings) -> str:
    """See whether the service with these settings is up on this machine.

    Args:
        settings: those that it was started with. One that answers HTTP is asked whether it is ready; of a runner alone the
            database tells when it was seen last.

    Returns:
        What was found, in a line.

    Raises:
        UsageError: its port is not known.
        UnavailableError: it is not up, or its database is away.
    """
    if not settings.serve_http:
        return _check_runner(settings)
    if settings.port == 0:
        raise UsageError("port 0 is a free one, which nobody but the service knows: name its port")
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not listened on
    host = everywhere.get(settings.host.strip("[]"), settings.host.strip("[]"))
    url = f"http://[{host}]:{settings.port}/readyz" if ":" in host else f"http://{host}:{settings.port}/readyz"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_CHECK_SECONDS) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise UnavailableError(f"the service at {url} is not ready: status {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UnavailableError(
            f"the service at {url} is not up: {getattr(reason, 'strerror', None) or reason}"
        ) from None
    return f"ready: {url}"


def _check_runner(settings: Settings) -> str:
    from autobatch.store import StoreUnavailableError
    from autobatch_server.database import open_database
    from autobatch_server.runner import RunnerBoard

    try:
        with open_database(settings.database_url) as database:
            board = RunnerBoard(database, stale_seconds=2 * settings.lease)
            seconds = board.seconds_since_seen(socket.gethostname())
    except StoreUnavailableError:
        raise UnavailableError("the database is away, so the runner can be given nothing") from None
    if seconds is None or seconds > 2 * settings.lease:
        when = "never" if seconds is None else f"{seconds:.0f} s ago"
        raise UnavailableError(
            f"the runner of {socket.gethostname()} was seen {when}, which is above {2 * settings.lease:g} s"
        )
    return f"running: seen {seconds:.0f} s ago"
