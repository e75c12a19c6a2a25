"""Logs of a service: lines for people, or JSON for programs. Never text, token ids or tensors.

A record says what happened; whose run, client and round it is about is noted once, where a process
or a task begins to work for them (`note_process`, `note`), and the JSON lines carry it.
"""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal, TextIO

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler

PACKAGES = ("lesft", "lesft_server", "lesft_aggregator", "lesft_client")
"""The loggers whose level --log-level sets."""

Value = str | int

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_process: dict[str, Value] = {}
"""What holds for the whole process, as logging itself does."""

_task: ContextVar[dict[str, Value | None]] = ContextVar("lesft_log_fields")
"""What holds for one task or thread."""


class LogSettings(BaseModel):
    """What a service logs, and how. A mixin of its settings."""

    log_format: Literal["text", "json"] = Field(
        "text", description="Lines for people, or one JSON object per line."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least important messages that are logged."
    )


def configure_logs(
    settings: LogSettings, service: str, text_format: str, date_format: str | None = None
) -> None:
    """Log to standard error from now on; the formats are logging's, for text.

    Leaves everything as it is where another program than ours has set up logging.
    """
    note_process(service=service)
    root, level = logging.getLogger(), _LEVELS[settings.log_level]
    if not all(isinstance(handler, _Handler) for handler in root.handlers):
        return
    handler = _Handler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(
        JsonFormatter()
        if settings.log_format == "json"
        else logging.Formatter(text_format, date_format)
    )
    root.handlers = [handler]
    # Other people's libraries may put anything into their debug messages: requests, bodies, text.
    root.setLevel(max(level, logging.INFO))
    for package in PACKAGES:
        # INFO at least, also where less is printed: the live page shows recent events.
        logging.getLogger(package).setLevel(min(level, logging.INFO))


class _Handler(_StreamHandler):
    """Ours, which a later call may replace."""


def note_process(**fields: Value) -> None:
    """From now on every record of this process is about these: run, client."""
    _process.update(fields)


def note(**fields: Value | None) -> None:
    """From now on the records of this task, or thread, are about these: client, round.

    A task begins with what holds where it is made; None takes that back.
    """
    _task.set({**_task.get({}), **fields})


class JsonFormatter(logging.Formatter):
    """One JSON object per line.

    `time` (RFC 3339, UTC), `level`, `logger`, `message`, `service`; `run`, `client` and `round`
    (counted from 0) where known; `exception` with its traceback where there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        fields: dict[str, Value | None] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_process,
            **_task.get({}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: fields[name] for name in fields if fields[name] is not None})
