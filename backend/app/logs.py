"""The server's log: one JSON object a line on standard error."""

import json
import logging
from datetime import datetime, timezone
from typing import Any

LONGEST_VALUE = 2000  # characters; a path, an id or an error's text may come from a client


class JsonFormatter(logging.Formatter):
    """A record as one line; json.dumps escapes whatever a client has put into it."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)[-LONGEST_VALUE:]
        return json.dumps({name: shorten(value) for name, value in values.items()})


class OncePerSecond(logging.Filter):
    """Let a message pass once a second for as long as it is repeated.

    Without a free file descriptor, asyncio logs the same error 2,000 times a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passed = ("", 0.0)

    def filter(self, record: logging.LogRecord) -> bool:
        message, last = self._passed
        if record.getMessage() == message and 0 <= record.created - last < 1:
            return False
        self._passed = record.getMessage(), record.created
        return True


def shorten(value: Any, limit: int = LONGEST_VALUE) -> Any:
    """Cut a text that is longer than the limit."""
    if isinstance(value, str) and len(value) > limit:
        return f"{value[: limit - 1]}…"
    return value


def log_to_stderr() -> None:
    """Send every line to standard error as JSON: ours, the libraries', Python's warnings.

    Whoever has set up logging before keeps what they set up.
    """
    if logging.root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.root.addHandler(handler)
    logging.captureWarnings(True)
    logging.getLogger("app").setLevel(logging.INFO)
    logging.getLogger("asyncio").addFilter(OncePerSecond())
    uvicorn = logging.getLogger("uvicorn")
    if all(type(h.formatter).__module__ == "uvicorn.logging" for h in uvicorn.handlers):
        uvicorn.handlers.clear()  # its default, which writes plain text
        uvicorn.propagate = True
