"""Lines of the log: for people, or one JSON object each. Whatever is logged for a request carries the request's id.

It knows no call: who logs one gives its fields as `extra={"fields": {...}}`.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from teacher_server.exchange import CURRENT


def name_request(record: logging.LogRecord) -> bool:
    """A filter that keeps everything, and says for which request a record was made."""
    exchange = CURRENT.get()
    if exchange is not None and not hasattr(record, "request_id"):
        record.request_id = exchange.request_id
    return True


class PlainLines(logging.Formatter):
    """Time, level, logger and text; a text is one line, whatever a client put into it, and a traceback follows."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        record.message = _one_line(record.message)
        request_id = getattr(record, "request_id", "")
        if request_id and request_id not in record.message:
            record.message += f" (request {request_id})"
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """`time` (RFC 3339, UTC), `level`, `logger`, `message`, then `request_id`, fields, `traceback` where there are."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object without line ends."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if hasattr(record, "request_id"):
            line["request_id"] = record.request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) if not text.isprintable() else text
