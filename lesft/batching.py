"""Continuous batching: steps of many sequences that wait at the same time go through together."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")

LARGE_STEP = 32
"""A step of more tokens, such as a prompt, goes through by itself: a batch saves it nothing."""

MAX_BATCH = 64
"""Sequences in one batch."""

SHORTEST_GATHER_SECONDS = 0.004
"""How long a batch waits at least for sequences that are due in a moment."""

_LONGEST_LATENESS_SECONDS = 0.25
"""A sequence that is later than this is not waited for; nor one that is later than half of the time
that it takes as a rule, or that a batch takes."""

_ALIKE = 256
"""Sequences up to this many tokens are short, all the same. Longer ones go with those of at least
half and at most twice their length: in a batch all cost as much as the longest."""


@dataclass(eq=False)
class _Waiting(Generic[Request, Result]):
    sequence: object
    request: Request
    num_tokens: int
    length: int
    result: "asyncio.Future[Result]"

    @property
    def large(self) -> bool:
        return self.num_tokens > LARGE_STEP

    def goes_with(self, other: "_Waiting[Request, Result]") -> bool:
        ours, theirs = max(self.length, _ALIKE), max(other.length, _ALIKE)
        return ours <= 2 * theirs and theirs <= 2 * ours


class _Turnaround:
    """How long a sequence takes from an answer to its next request."""

    def __init__(self) -> None:
        self._answered = 0.0
        self._seconds: float | None = None

    def answered(self) -> None:
        """It has an answer."""
        self._answered = time.monotonic()

    def came_back(self) -> None:
        """It asks again."""
        seconds = time.monotonic() - self._answered
        self._seconds = seconds if self._seconds is None else (self._seconds + seconds) / 2

    def likely_until(self, end: float, batch_seconds: float) -> float:
        """Until when it is likely to come, if it is before the end; else 0.

        Nothing is known of a sequence that has never come back.
        """
        if self._seconds is None or self._answered + self._seconds > end:
            return 0.0
        lateness = max(SHORTEST_GATHER_SECONDS, self._seconds / 2, batch_seconds / 2)
        return self._answered + self._seconds + min(lateness, _LONGEST_LATENESS_SECONDS)


class Batcher(Generic[Request, Result]):
    """Collects requests and runs them in batches, one batch at a time.

    A large request, such as a long prompt, goes by itself, and small ones in between: nobody who
    writes waits for all who have just come. Lives on an event loop.
    """

    def __init__(
        self, run: Callable[[Sequence[Request]], Awaitable[Iterable[Result | Exception]]]
    ) -> None:
        """`run` gives the results of a batch in its order, an exception for each that failed.

        What it raises, all in the batch get.
        """
        self._run = run
        self._waiting: list[_Waiting[Request, Result]] = []
        self._turnarounds: dict[object, _Turnaround] = {}
        self._batch_seconds = 0.0
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._large_is_next = True
        self.batches = 0
        """Batches that were run."""
        self.requests = 0
        """Requests in them."""

    async def submit(
        self, sequence: object, request: Request, num_tokens: int, length: int
    ) -> Result:
        """The result of a request of `num_tokens` new tokens, which make a sequence `length` long.

        A sequence has at most one request under way. One whose caller is cancelled is dropped,
        unless it is being run.
        """
        if sequence in self._turnarounds:
            self._turnarounds[sequence].came_back()
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(sequence, request, num_tokens, length, result)
        self._waiting.append(waiting)
        self._arrived.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await result
        finally:
            self._waiting = [other for other in self._waiting if other is not waiting]

    def forget(self, sequence: object) -> None:
        """The sequence is over; no batch waits for it any more."""
        self._turnarounds.pop(sequence, None)
        self._arrived.set()

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                batch = self._take()
                if batch:
                    await self._run_batch(batch)
        except asyncio.CancelledError:  # whoever runs the batches has ended
            for waiting in self._waiting:
                waiting.result.cancel()
            raise

    async def _gather(self) -> None:
        # At most as long as a batch takes, which is what another one for those who come would cost:
        # most of that time is the same for one sequence as for many.
        end = time.monotonic() + max(SHORTEST_GATHER_SECONDS, self._batch_seconds)
        while (left := min(end, self._others_likely_until(end)) - time.monotonic()) > 0:
            self._arrived.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _others_likely_until(self, end: float) -> float:
        """Until when a sequence that is not here is likely to come before the end; 0 for none."""
        here = {waiting.sequence for waiting in self._waiting}
        return max(
            (
                turnaround.likely_until(end, self._batch_seconds)
                for sequence, turnaround in self._turnarounds.items()
                if sequence not in here
            ),
            default=0.0,
        )

    def _take(self) -> list[_Waiting[Request, Result]]:
        """The next batch: small requests, or one large one, in turn where there are both.

        The one that has waited longest is always in it.
        """
        waiting = [w for w in self._waiting if not w.result.done()]  # else its caller has gone
        small = [w for w in waiting if not w.large]
        small = [w for w in small if w.goes_with(small[0])][:MAX_BATCH]
        large = [w for w in waiting if w.large][:1]
        batch = large if large and (self._large_is_next or not small) else small
        self._large_is_next = batch is not large
        self._waiting = [w for w in waiting if w not in batch]
        return batch

    async def _run_batch(self, batch: Sequence[_Waiting[Request, Result]]) -> None:
        self.batches += 1
        self.requests += len(batch)
        began = time.monotonic()
        results: Iterable[Result | Exception]
        try:
            results = await self._run([waiting.request for waiting in batch])
        except Exception as error:
            results = [error] * len(batch)
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.result.cancel()
            raise
        if not batch[0].large:
            self._batch_seconds = time.monotonic() - began
        for waiting, result in zip(batch, results, strict=True):
            if waiting.result.done():  # its caller has gone, and with it the sequence
                continue
            if isinstance(result, Exception):
                waiting.result.set_exception(result)
            else:
                self._turnarounds.setdefault(waiting.sequence, _Turnaround()).answered()
                waiting.result.set_result(result)
