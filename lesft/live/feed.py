"""What a service shows, read once for all who watch.

Nothing is queued: a watcher takes what has changed since it took last, however long ago that was.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from lesft.errors import Busy

log = logging.getLogger(__name__)

MAX_WATCHERS = 32
POLL_SECONDS = 1.0

Sections = Mapping[str, bytes]
"""JSON by the name of its part of the page, each as `"name":value`."""


class Feed:
    """Reads the service once a second while anybody watches.

    Lives on the event loop of the first watcher; only `stop` may be called from elsewhere.
    """

    changed: asyncio.Future[None]
    """Done when there is news; then there is another one."""
    ended: asyncio.Future[None]
    """Done when whoever watches now must go: the service stops, or cannot be read."""

    def __init__(self, read: Callable[[], Awaitable[Sections]]) -> None:
        self._read = read
        self._sections: dict[str, bytes] = {}
        self._read_at = 0.0
        self._reading = asyncio.Lock()
        self._poll: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self.watchers = 0

    def stop(self) -> None:
        """End all streams, now and from now on. Safe at any time and from any thread."""
        self._stopped = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody watches any more
                self._loop.call_soon_threadsafe(self._end)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A watcher's place while the block runs. Raises Busy when all are taken."""
        if self.watchers == MAX_WATCHERS:
            raise Busy(f"{MAX_WATCHERS} streams of events are open already: close a page")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self.changed, self.ended = self._loop.create_future(), self._loop.create_future()
        if self._stopped:
            self._end()
        self.watchers += 1
        try:
            yield
        finally:
            self.watchers -= 1
            if not self.watchers and self._poll is not None:
                self._poll.cancel()
                self._poll = None

    async def refresh(self) -> None:
        """Read the service, unless that was done just now; from here on, keep reading it."""
        async with self._reading:
            if time.monotonic() - self._read_at > POLL_SECONDS / 2:
                await self._read_sections()
        if self._poll is None and self.watchers:
            self._poll = asyncio.create_task(self._keep_reading())

    def news(self, taken: dict[str, bytes]) -> list[bytes]:
        """The sections that are not as they were `taken`, which is brought up to date."""
        news = {name: json for name, json in self._sections.items() if taken.get(name) is not json}
        taken |= news
        return list(news.values())

    async def _read_sections(self) -> None:
        sections = await self._read()
        self._read_at = time.monotonic()
        changed = {
            name: json for name, json in sections.items() if self._sections.get(name) != json
        }
        if changed:
            self._sections |= changed
            self.changed.set_result(None)
            self.changed = asyncio.get_running_loop().create_future()

    async def _keep_reading(self) -> None:
        try:
            while True:
                await asyncio.sleep(POLL_SECONDS)
                async with self._reading:
                    await self._read_sections()
        except Exception:
            log.exception("the figures for the live page cannot be read")
            self._poll = None
            self._end()
            self.ended = asyncio.get_running_loop().create_future()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
