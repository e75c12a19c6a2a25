"""HTTP requests that are none: answered or cut off, without a traceback or a line in the log each.

uvicorn's protocol takes a body that breaks the rules for the end of a request that it answers, and
then fails over its own answer.
"""

import asyncio
import logging

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

FIRST_REQUEST_SECONDS = 15
"""After it, a kept-alive connection has uvicorn's own limit."""

_REFUSAL = "Invalid HTTP request received."


class CarefulProtocol(H11Protocol):
    """One connection; one over which no request comes for a while is closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._first_request = asyncio.get_running_loop().call_later(
            FIRST_REQUEST_SECONDS, self._close_if_silent
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._first_request.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()

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
