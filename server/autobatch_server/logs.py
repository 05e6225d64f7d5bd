"""Log lines as JSON objects, one a line, on standard error: no token is ever in one."""

from __future__ import annotations

import datetime as dt
import functools
import json
import logging
import re
import sys

from autobatch_server.problems import request_id

__all__ = ["configure_logging"]

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_SECRET = re.compile(r"abt_[A-Za-z0-9_-]+", re.IGNORECASE)  # also one that is cut short, or otherwise not quite a token
_ENCODER = json.JSONEncoder(default=str)  # made once: a line is written for every request


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, object] = {
            "at": f"{_second(int(record.created))}.{int(record.created % 1 * 1000):03}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if own := request_id.get():
            content["request_id"] = own
        fields = record.__dict__
        for key in sorted(fields.keys() - _OWN):
            if fields[key] is not None:
                content[key] = fields[key]
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        # In ASCII, so that no character of a path ends the line for one reader and not for another.
        text = _ENCODER.encode(content)
        return _SECRET.sub("abt_...", text) if "abt_" in text.lower() else text


@functools.lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    """A second of the calendar: most lines of a busy service share one."""
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")


def configure_logging(level: str) -> None:
    """Send every log line of this process to standard error, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True  # ours says more, and nothing of a query's contents
    logging.getLogger("alembic").setLevel(logging.WARNING)
