"""The endpoint on a free port of this process, over a model whose answers are written down."""

import asyncio
import sys
import time
import types
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from lesft.control import ControlServer
from lesft_client.endpoint.app import Endpoint
from lesft_client.endpoint.asking import Defaults
from lesft_client.language_model import GenerationRequest, LanguageModel, Piece
from lesft_client.settings import LanguageModelSettings
from tests.client.fake_language_model import FakeLanguageModel


class SlowModel(FakeLanguageModel):
    """Takes its time for each token; `num_pieces` were given, `num_ended` texts are over."""

    seconds_per_token = 0.01
    num_pieces = 0
    num_ended = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """See `LanguageModel`."""
        try:
            async for piece in super().generate(request):
                await asyncio.sleep(self.seconds_per_token)
                self.num_pieces += 1
                yield piece
        finally:
            self.num_ended += 1


class Served:
    """An endpoint that listens."""

    def __init__(self, endpoint: Endpoint, url: str) -> None:
        self.endpoint = endpoint
        self.url = url


@contextmanager
def served(
    model: LanguageModel, api_key: str | None = None, defaults: Defaults | None = None
) -> Iterator[Served]:
    """Serve a model in the block."""
    endpoint = Endpoint(model, defaults or Defaults(), api_key)
    server = ControlServer(endpoint.app, insecure=False)
    address = server.start_in_thread("127.0.0.1:0")
    try:
        yield Served(endpoint, f"http://{address}")
    finally:
        server.stop_thread()


def wait_until(is_true: Callable[[], bool], seconds: float = 10) -> None:
    """Fails when it does not come true."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def have_commands_open(
    monkeypatch: pytest.MonkeyPatch, model: LanguageModel | Exception
) -> list[str]:
    """Commands open this model, or fail to; the list tells when they open and close it."""
    events: list[str] = []

    @asynccontextmanager
    async def open_model(settings: LanguageModelSettings) -> AsyncIterator[LanguageModel]:
        if isinstance(model, Exception):
            raise model
        events.append("opened")
        try:
            yield model
        finally:
            events.append("closed")

    module = types.ModuleType("lesft_client.open_model")
    module.open_model = open_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lesft_client.open_model", module)
    return events
