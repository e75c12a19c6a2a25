"""Several texts written at the same time, as one stream of pieces."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request

from lesft.errors import Unreachable
from lesft_client.endpoint.metrics import Metrics
from lesft_client.language_model import GenerationRequest, LanguageModel, Piece

T = TypeVar("T")

_Item = tuple[int, Piece] | Exception | None
"""A piece of the text of a number; what ended a text too early; the regular end of a text."""


class HungUp(Exception):
    """The client is gone: nobody waits for the answer."""


class Writer:
    """Has the model write, until the endpoint is stopped."""

    def __init__(self, model: LanguageModel, metrics: Metrics) -> None:
        self._model = model
        self._metrics = metrics
        self._under_way: set[asyncio.Queue[_Item]] = set()
        self._stopped = False

    def stop(self) -> None:
        """End what is being written with an error that says so, and refuse what comes later."""
        self._stopped = True
        for queue in self._under_way:
            queue.put_nowait(_stopping())

    async def write(
        self, requests: Sequence[GenerationRequest]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all texts as they come, each with its text's number.

        Closing it ends all texts, and so does an error in one of them. Raises what the model
        raises, and Unreachable when the endpoint is stopped.
        """
        if self._stopped:
            raise _stopping()
        queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._under_way.add(queue)
        tasks = [
            asyncio.create_task(self._write(number, request, queue))
            for number, request in enumerate(requests)
        ]
        num_left = len(tasks)
        try:
            while num_left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_left -= 1
                else:
                    yield item
        finally:
            self._under_way.discard(queue)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(
        self, number: int, request: GenerationRequest, queue: asyncio.Queue[_Item]
    ) -> None:
        try:
            async with aclosing(self._model.generate(request)) as pieces:
                self._metrics.prompt_tokens(len(request.prompt_ids))
                async for piece in pieces:
                    self._metrics.completion_tokens(len(piece.token_ids))
                    queue.put_nowait((number, piece))
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)


def _stopping() -> Unreachable:
    return Unreachable("the endpoint is being stopped")


async def unless_hung_up(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns. When the client hangs up, ends the work and raises HungUp."""
    working = asyncio.create_task(work)
    hanging_up = asyncio.create_task(_hang_up(request))
    try:
        await asyncio.wait({working, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HungUp
    finally:
        for task in (working, hanging_up):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(working, hanging_up, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
