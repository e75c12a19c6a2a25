"""The client's own parts in this process, against real services on free ports."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from lesft_aggregator.server import Aggregator
from lesft_aggregator.settings import AggregatorSettings
from lesft_client.train_settings import TrainSettings
from tests.harness import RunningServer


@contextmanager
def running_aggregator(state: Path, clients: int = 1) -> Iterator[str]:
    """An aggregator in this process; gives its gRPC address."""
    settings = AggregatorSettings(
        state=state, clients=clients, listen="127.0.0.1:0", control="127.0.0.1:0"
    )
    with aggregator_of(settings) as (_, endpoints):
        yield endpoints["grpc"]


@contextmanager
def aggregator_of(settings: AggregatorSettings) -> Iterator[tuple[Aggregator, Mapping[str, str]]]:
    """An aggregator on an event loop in a thread of its own, and its endpoints."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def on_loop(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    async def make() -> Aggregator:
        return Aggregator(settings)

    try:
        aggregator = on_loop(make())
        try:
            yield aggregator, on_loop(aggregator.start())
        finally:
            on_loop(aggregator.stop("the test is over"))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def train_settings(
    server: RunningServer, aggregator: str, folder: Path, **options: Any
) -> TrainSettings:
    """Settings of a client that keeps everything in `folder`."""
    values: dict[str, Any] = {
        "server": server.grpc,
        "aggregator": aggregator,
        "control": "127.0.0.1:0",
        "client_id": "client-0",
        "state": folder / "state",
        "cache": folder / "cache",
        "progress": "lines",
    }
    return TrainSettings(**{**values, **options})


class CountingChannel:
    """A gRPC channel that notes the size of every message, by method, as it is on the wire."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.sent: list[tuple[str, int]] = []
        self.received: list[tuple[str, int]] = []

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        def make(
            method: str, request_serializer: Any, response_deserializer: Any, **kw: Any
        ) -> Any:
            name = method.rpartition("/")[2]

            def serialize(message: Any) -> bytes:
                data: bytes = request_serializer(message)
                self.sent.append((name, len(data)))
                return data

            def deserialize(data: bytes) -> Any:
                self.received.append((name, len(data)))
                return response_deserializer(data)

            return getattr(self._channel, kind)(method, serialize, deserialize, **kw)

        return make

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "CountingChannel":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
