"""A language model on an event loop in a thread of its own, for a program that is not asynchronous.

The main thread is then free to wait for its user, and Ctrl-C never breaks into the event loop.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lesft_client.language_model import LanguageModel

T = TypeVar("T")


class ModelThread:
    """Opens a model, runs what uses it, and closes it."""

    def __init__(self, opening: "AbstractAsyncContextManager[LanguageModel]") -> None:
        self.model: LanguageModel
        self._opening = opening
        self._opened: Future[LanguageModel] = Future()
        self._closed: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop
        self._closing: asyncio.Event
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def __enter__(self) -> "ModelThread":
        """Wait until the model is open. Raises what opening it raises."""
        self._thread.start()
        self.model = self._opened.result()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the model. Raises what closing it raises."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._closed.result()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns or raises; when interrupted, it is ended first."""
        result: Future[T] = Future()
        ended = threading.Event()
        tasks: list[asyncio.Task[T]] = []

        def finish(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                result.cancel()
            elif (error := task.exception()) is not None:
                result.set_exception(error)
            else:
                result.set_result(task.result())
            ended.set()

        def start() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(finish)

        self._loop.call_soon_threadsafe(start)
        try:
            return result.result()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            ended.wait()
            raise

    def _run(self) -> None:
        try:
            asyncio.run(self._hold())
        except BaseException as error:
            (self._closed if self._opened.done() else self._opened).set_exception(error)
        else:
            self._closed.set_result(None)

    async def _hold(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        async with self._opening as model:
            self._opened.set_result(model)
            await self._closing.wait()
