"""HTTP requests that are none: answered or cut off, without a traceback or a line in the log each.

uvicorn's protocol takes a body that breaks the rules for the end of a request that it answers, and
then fails over its own answer; and it waits for ever for the rest of a request that has begun.
"""

import asyncio
import logging

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 20
"""In which a request must be whole, from the connection's beginning or the answer before; between
two requests uvicorn's own limit is shorter."""

MAX_CONNECTIONS = 512
"""Of one listener at once, whoever they are of: each takes a file descriptor of the service."""

_REFUSAL = "Invalid HTTP request received."


class CarefulProtocol(H11Protocol):
    """One connection; one over which no whole request comes for a while is closed."""

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Its time runs for as long as the other side owes us a request, or the rest of one."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._unwatch()
        elif self._due is None and not self.transport.is_closing():
            self._due = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def send_400_response(self, msg: str) -> None:
        """See uvicorn; also while an answer is under way or has been given."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its own answer has nowhere to go
            self.cycle.message_event.set()
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.close()


class _WithoutRefusals(logging.Filter):
    """Drops what strangers could fill a disk with."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.msg != _REFUSAL


logging.getLogger("uvicorn.error").addFilter(_WithoutRefusals())
