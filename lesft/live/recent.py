"""The last events of a service, for its page: what it logs, and what it tells its user."""

import logging
import threading
import time
from collections import deque

from pydantic import BaseModel

from lesft.errors import one_line

MAX_EVENTS = 200
LOGGERS = ("lesft", "lesft_server", "lesft_client", "lesft_aggregator")


class Event(BaseModel):
    """One line of the log. The time is in seconds since 1970."""

    time: float
    level: str
    message: str


class RecentEvents(logging.Handler):
    """Keeps the last records of our own loggers, from INFO up. Safe to use from any thread."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._guard = threading.Lock()
        self.version = 0
        """Grows with every event."""

    def attach(self) -> None:
        """Listen to the loggers until `detach`."""
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)

    def detach(self) -> None:
        """Listen no more. Safe to call when never attached."""
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging. A traceback stays in the log."""
        try:
            message = record.getMessage()
        except Exception:
            self.handleError(record)
            return
        self._add(record.created, record.levelname, message)

    def note(self, message: str) -> None:
        """An event that is not logged."""
        self._add(time.time(), "INFO", message)

    def newest_first(self) -> list[Event]:
        """A copy."""
        with self._guard:
            return list(reversed(self._events))

    def _add(self, created: float, level: str, message: str) -> None:
        event = Event(time=created, level=level, message=one_line(message))
        with self._guard:
            self._events.append(event)
            self.version += 1
