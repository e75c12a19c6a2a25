"""The answer that does not end: server-sent events (WHATWG HTML, section 9.2)."""

import asyncio
import logging
import time
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lesft.live.feed import Feed

log = logging.getLogger(__name__)

RETRY_MILLISECONDS = 1000
KEEP_ALIVE_SECONDS = 15.0
STREAM_SECONDS = 60.0
"""A stream's length. The page opens the next one at once, and its token is looked at again."""
SEND_SECONDS = 10.0
"""How long one event may wait for a reader that takes nothing."""
_END_SECONDS = 0.2

_START = b"retry: %d\n" % RETRY_MILLISECONDS
_KEEP_ALIVE = b":\n\n"


class EventStream(Response):
    """A snapshot, then its changes, for STREAM_SECONDS.

    It ends before that when the reader leaves or does not read, or the service stops.

    Each event's data is an object with the service's clock as `now` and one member for each part of
    the page: all of them in event `snapshot`, those that changed in event `change`.
    """

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by the web framework. Raises Busy when there are too many streams."""
        with self._feed.place():
            await self._feed.refresh()
            leaving = asyncio.create_task(_disconnected(receive))
            ends: set[asyncio.Future[Any]] = {leaving, self._feed.ended}
            try:
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
                if await self._send_all(send, ends) and not leaving.done():
                    await _sent(send, b"", ends=set(), seconds=_END_SECONDS, more=False)
            finally:
                leaving.cancel()

    async def _send_all(self, send: Send, ends: set[asyncio.Future[Any]]) -> bool:
        """Returns True at the end, False for a reader that does not read."""
        until = time.monotonic() + STREAM_SECONDS
        taken: dict[str, bytes] = {}
        text = _START + _event("snapshot", self._feed.news(taken))
        while True:
            if not await _sent(send, text, ends, SEND_SECONDS):
                if any(end.done() for end in ends):
                    return True
                log.info("a page that read no events for %g s was cut off", SEND_SECONDS)
                return False
            changed = self._feed.changed
            news = self._feed.news(taken)
            if not news:
                left = max(0.0, min(KEEP_ALIVE_SECONDS, until - time.monotonic()))
                await asyncio.wait(
                    {changed, *ends}, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                news = self._feed.news(taken)
            if time.monotonic() >= until or any(end.done() for end in ends):
                return True
            text = _event("change", news) if news else _KEEP_ALIVE


async def _sent(
    send: Send, text: bytes, ends: set[asyncio.Future[Any]], seconds: float, more: bool = True
) -> bool:
    """Whether the reader took a text in time, and before one of `ends` was done."""
    body = {"type": "http.response.body", "body": text, "more_body": more}
    sending = asyncio.ensure_future(send(body))
    try:
        await asyncio.wait({sending, *ends}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
        return sending.done()
    finally:
        sending.cancel()


def _event(kind: str, sections: list[bytes]) -> bytes:
    now = b'"now":%.3f' % time.time()
    return b"event: %s\ndata: {%s}\n\n" % (kind.encode(), b",".join([now, *sections]))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
