"""A client of the REST service: one address, a token, errors in one line."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from autobatch.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from email.message import Message
    from typing import IO

__all__ = ["ServiceClient"]

_TIMEOUT_SECONDS = 10.0
# A service that restarts, or whose database is away for a moment, is there again within these pauses.
_PAUSES_SECONDS = (1.0, 3.0)
_PASSING = frozenset({429, 502, 503, 504})
_LONGEST_ANSWER = 1 << 24


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token goes to the address that was named, and to no other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Follow nothing: the redirect is an error."""


@dataclass(frozen=True, kw_only=True)
class ServiceClient:
    """The service at one address."""

    url: str
    """Like `http://scheduler:8000`."""
    token: str | None = None
    """A bearer token, where the service asks for one."""
    flag: str = "--report-to"
    """What the command line calls the address, for messages."""
    scope: str = "probe:write"
    """The scope that the token needs, for messages."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            _ = parts.port
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in {"http", "https"} or not parts.hostname or not self.url.isprintable() or " " in self.url:
            raise UsageError(
                f"{self.flag} {self.url!r} is no address of a service: write one like http://scheduler:8000"
            )
        if parts.username is not None or parts.query or parts.fragment:
            raise UsageError(f"{self.flag} takes an address alone; a token goes into the variable AUTOBATCH_TOKEN")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise UsageError("the token in AUTOBATCH_TOKEN has characters that no token has: copy it again")

    def ask(self, method: str, path: str, content: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Ask, again where what fails may pass.

        Args:
            method: of HTTP.
            path: from the root, such as `/v1/workloads`.
            content: the body, sent as JSON; none where None.

        Returns:
            The object that came.

        Raises:
            UnavailableError: the service is not there, or refuses; the message says why.
        """
        for pause in _PAUSES_SECONDS:
            try:
                return self._ask_once(method, path, content)
            except _PassingError:
                time.sleep(pause)
        try:
            return self._ask_once(method, path, content)
        except _PassingError as error:
            raise UnavailableError(f"the service at {self.url} cannot be used: {error}") from None

    def _ask_once(self, method: str, path: str, content: Mapping[str, object] | None) -> dict[str, Any]:
        headers = {"Accept": "application/json", "User-Agent": "autobatch"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        body = None
        if content is not None:
            body = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            self.url.rstrip("/") + path, data=body, headers=headers, method=method
        )
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=_TIMEOUT_SECONDS) as answer:
                form = json.loads(answer.read(_LONGEST_ANSWER))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _PassingError(str(getattr(reason, "strerror", None) or reason or type(reason).__name__)) from None
        if not isinstance(form, dict):
            raise UnavailableError(f"what answers at {self.url} is not autobatch's service")
        return form

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """Say why by the problem document that came, if one came."""
        try:
            problem = json.loads(error.read(_LONGEST_ANSWER))
            detail = f"{problem['detail']} ({problem['code']})"
        except (OSError, ValueError, KeyError, TypeError, RecursionError, http.client.HTTPException):
            detail = f"status {error.code}"
        if error.code in _PASSING:
            return _PassingError(detail)
        hint = f"; a token with the scope {self.scope} goes into AUTOBATCH_TOKEN" if error.code in {401, 403} else ""
        return UnavailableError(f"the service at {self.url} refuses: {detail}{hint}")


class _PassingError(Exception):
    """What may be gone in a moment."""
