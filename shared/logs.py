"""The log of a daemon or a node: one line an event, on standard error.

Under systemd the journal adds the time and reads the level from a prefix (sd-daemon(3)); elsewhere a line has both
in words. As JSON, a line is an object with ts, level, logger, message and whatever the event adds.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Literal

Format = Literal["text", "json"]
QUIET = ("alembic", "httpcore", "httpx", "uvicorn.access")  # a line for each request or migration says nothing new
OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def setup(format: Format = "text", level: int = logging.INFO) -> None:
    """Send every logger's events to standard error, and Python's warnings with them. Replaces earlier handlers."""
    handler = logging.StreamHandler(sys.stderr)
    if format == "json":
        handler.setFormatter(Json())
    else:
        handler.setFormatter(Journal() if os.environ.get("JOURNAL_STREAM") else Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)


def extra(record: logging.LogRecord) -> dict[str, Any]:
    """Return what the event adds: the `extra` that it was logged with."""
    return {name: value for name, value in vars(record).items() if name not in OWN}


class Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the event's line."""
        values: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        return json.dumps(extra(record) | values, default=str, ensure_ascii=False)


class Text(logging.Formatter):
    """Time, level, logger and message; a traceback follows in the same line, its parts between bars."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the event's line."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return f"{at[:-6]}Z {record.levelname:<7} {self.event(record)}"

    def event(self, record: logging.LogRecord) -> str:
        """Return the line without time and level."""
        lines = record.getMessage().splitlines() or [""]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        return f"{record.name}: {' | '.join(lines)}"


class Journal(Text):
    """The level as the journal reads it, and no time: the journal has its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the event's line."""
        return f"<{PRIORITIES.get(record.levelno, 6)}>{self.event(record)}"
