"""A small service with a live page on a real socket, and a reader of its events."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from starlette.types import ASGIApp

from lesft.control import ControlServer, make_control_app
from lesft.live import LivePage

GENERATION = (
    "sequences",
    "max_sequences",
    "tokens",
    "batches",
    "cache_bytes_reserved",
    "cache_bytes",
)


class Snapshot(BaseModel):
    """Parts that change apart from each other."""

    service: str = "server"
    run: dict[str, Any]
    clients: list[dict[str, Any]]
    curve: dict[str, Any] | None
    generation: dict[str, int]


@dataclass
class Service:
    """What the page shows, to be changed by the test."""

    run: dict[str, Any] = field(default_factory=dict)
    clients: list[dict[str, Any]] = field(default_factory=list)
    curve: dict[str, Any] | None = None
    page: LivePage = field(default_factory=LivePage)
    address: str = ""
    snapshots: int = 0
    error: Exception | None = None

    async def snapshot(self) -> Snapshot:
        self.snapshots += 1
        if self.error is not None:
            raise self.error
        return Snapshot(
            run=self.run,
            clients=self.clients,
            curve=self.curve,
            generation=dict.fromkeys(GENERATION, 0),
        )

    def app(self) -> ASGIApp:
        made = make_control_app("test", CollectorRegistry(), lambda: None)
        self.page.add_to(made, "LESFT <test>", self.snapshot)
        return made

    @property
    def url(self) -> str:
        return f"http://{self.address}"


@contextmanager
def serving(service: Service, app: ASGIApp | None = None, port: int = 0) -> Iterator[Service]:
    """Serve it while the block runs."""
    server = ControlServer(app or service.app(), insecure=False)
    service.address = server.start_in_thread(f"127.0.0.1:{port}")
    service.page.start()
    try:
        yield service
    finally:
        service.page.stop()
        server.stop_thread()


@dataclass(frozen=True)
class Event:
    """One server-sent event, or a comment: then it has no name."""

    name: str
    data: dict[str, Any]
    retry: int | None
    seconds: float
    """When it came, on the monotonic clock."""


@contextmanager
def events_of(address: str) -> Iterator[Iterator[Event]]:
    """The events of a service; the stream is closed at the block's end."""
    with (
        httpx.Client(
            timeout=10, verify=False
        ) as http,  # to read the CAs takes longer than all else
        http.stream("GET", f"http://{address}/v1/events") as response,
    ):
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        yield _parsed(response)


def _parsed(response: httpx.Response) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
            continue
        yield Event(
            fields.get("event", ""),
            json.loads(fields.get("data", "{}")),
            int(fields["retry"]) if "retry" in fields else None,
            time.monotonic(),
        )
        fields = {}


def first_of(address: str) -> dict[str, Any]:
    """The snapshot that a new reader gets."""
    with events_of(address) as events:
        event = next(events)
    assert event.name == "snapshot"
    return event.data
