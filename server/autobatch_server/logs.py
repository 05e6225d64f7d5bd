"""Log lines as JSON objects, one a line, on standard error: no token is ever in one."""

from __future__ import annotations

import datetime as dt
import json
import logging
import re
import sys

from autobatch_server.problems import request_id

__all__ = ["configure_logging"]

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_SECRET = re.compile(r"abt_[A-Za-z0-9_-]+", re.IGNORECASE)  # also one that is cut short, or otherwise not quite a token


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = dt.datetime.fromtimestamp(record.created, tz=dt.UTC)
        content: dict[str, object] = {
            "at": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if own := request_id.get():
            content["request_id"] = own
        content |= {key: value for key, value in vars(record).items() if key not in _OWN and value is not None}
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        # In ASCII, so that no character of a path ends the line for one reader and not for another.
        return _SECRET.sub("abt_...", json.dumps(content, default=str))


def configure_logging(level: str) -> None:
    """Send every log line of this process to standard error, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True  # ours says more, and nothing of a query's contents
    logging.getLogger("alembic").setLevel(logging.WARNING)
