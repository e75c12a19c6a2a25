"""The page's routes: its files, which are the same for every service, and its events."""

import html
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, TypeAdapter

from lesft.live.feed import Feed, Sections
from lesft.live.recent import Event, RecentEvents
from lesft.live.stream import EventStream

ASSETS = {
    "live.css": "text/css",
    "live.js": "text/javascript",
    "live-aggregator.js": "text/javascript",
    "live-chart.js": "text/javascript",
    "live-client.js": "text/javascript",
    "live-connection.js": "text/javascript",
    "live-format.js": "text/javascript",
    "live-sections.js": "text/javascript",
    "live-server.js": "text/javascript",
    "live-table.js": "text/javascript",
    "live-views.js": "text/javascript",
}
"""What the page loads, all of it from its own service: name, which is also the path, and type."""

PAGE_PATHS = ("/", *(f"/{name}" for name in ASSETS))
"""Who opens these learns nothing about the run."""

_SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
_PAGE = {
    **_SAFE,
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_STREAM = {**_SAFE, "X-Accel-Buffering": "no"}  # nginx would hold the events back

_EVENTS = TypeAdapter(list[Event])


class LivePage:
    """The page of one service. Its events are noted between `start` and `stop`."""

    def __init__(self) -> None:
        self.events = RecentEvents()
        self._feed: Feed | None = None
        self._events_json: tuple[int, bytes] = (-1, b"")

    def start(self) -> None:
        """Note events from here on."""
        self.events.attach()

    def stop(self) -> None:
        """End the streams, so that the web server need not wait for them.

        Safe to call from any thread, and when never started.
        """
        self.events.detach()
        if self._feed is not None:
            self._feed.stop()

    def add_to(
        self, app: FastAPI, title: str, snapshot: Callable[[], Awaitable[BaseModel]]
    ) -> None:
        """Serve the page at `/` and its events at `/v1/events`.

        `snapshot` is called on the app's event loop, at most once a second and only while somebody
        watches. Each field of the model that it returns is a part of the page.
        """
        feed = self._feed = Feed(lambda: self._read(snapshot))
        folder = files("lesft.live") / "assets"
        page = (folder / "live.html").read_text("utf-8").replace("{{title}}", html.escape(title))

        # Not in the API's description: a page is no API, and it has no words for what never ends.
        @app.get("/", include_in_schema=False)
        async def live_page() -> Response:
            return HTMLResponse(page, headers=_PAGE)

        for name, media_type in ASSETS.items():
            content = (folder / name).read_bytes()
            app.get(f"/{name}", include_in_schema=False)(_asset(content, media_type))

        @app.get("/v1/events", include_in_schema=False)
        async def events() -> Response:
            return EventStream(feed, _STREAM)

    async def _read(self, snapshot: Callable[[], Awaitable[BaseModel]]) -> Sections:
        body = await snapshot()
        sections = {
            name: body.model_dump_json(include={name}).encode()[1:-1]
            for name in type(body).model_fields
        }
        version = self.events.version
        if version != self._events_json[0]:
            json = _EVENTS.dump_json(self.events.newest_first())
            self._events_json = version, b'"events":' + json
        return {**sections, "events": self._events_json[1]}


def _asset(content: bytes, media_type: str) -> Callable[[], Any]:
    async def asset() -> Response:
        return Response(content, media_type=media_type, headers=_PAGE)

    return asset
