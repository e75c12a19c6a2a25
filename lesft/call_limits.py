"""What one client may have under way at a service, so that it does not stand in others' way."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from lesft.call_interceptor import CallInterceptor
from lesft.errors import Busy
from lesft.identity.caller import caller_of
from lesft.limit_settings import CallLimits
from lesft.refusals import Refusals

Context = grpc.aio.ServicerContext[Any, Any]

_BURST_SECONDS = 4.0
"""A client that was quiet for so long may begin as many calls at once as it had time for."""

_FORGET_ABOVE = 10_000
"""Callers whose rate is remembered before all of them are forgotten: without TLS they may be
very many."""


def name_of_caller(context: Context) -> str:
    """The client's id by its certificate; where there is none, its connection's address."""
    caller = caller_of(context)
    return context.peer() if caller is None else caller.client_id


@dataclass
class _Bucket:
    tokens: float
    at: float


class CallLimiter(CallInterceptor):
    """Refuses calls over the limits with Busy. `name_of` tells the callers apart.

    A call whose answers nobody reads counts as long as its client keeps it: gRPC's Python server
    cannot end one with a message under way, and cancelled, it would hold that message uncounted.
    """

    def __init__(
        self,
        limits: CallLimits,
        refusals: Refusals,
        name_of: Callable[[Context], str] = name_of_caller,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._refusals = refusals
        self._name_of = name_of
        self._clock = clock
        self._under_way: Counter[str] = Counter()
        self._buckets: dict[str, _Bucket] = {}

    @property
    def under_way(self) -> int:
        """Calls of all clients."""
        return self._under_way.total()

    # ------------------------------------------------------------------ who may come

    @contextmanager
    def admit(self, caller: str) -> Iterator[None]:
        """One call, as long as the block lasts. Raises Busy."""
        self._check(caller)
        self._under_way[caller] += 1
        try:
            yield
        finally:
            self._under_way[caller] -= 1
            if not self._under_way[caller]:
                del self._under_way[caller]

    def _check(self, caller: str) -> None:
        limits = self._limits
        if self._under_way[caller] >= limits.max_calls_per_client:
            self._refuse("calls of one client", f"{limits.max_calls_per_client} calls of yours")
        if self.under_way >= limits.max_calls:
            self._refuse("calls of all clients", f"{limits.max_calls} calls of all clients")
        if not self._take_token(caller):
            self._refuse(
                "calls per second", f"{limits.calls_per_second:g} calls of yours each second"
            )

    def _refuse(self, reason: str, what: str) -> None:
        self._refusals.inc(reason)
        raise Busy(f"{what} is all that this service takes: try again in a while")

    def _take_token(self, caller: str) -> bool:
        now, rate = self._clock(), self._limits.calls_per_second
        most = max(1.0, rate * _BURST_SECONDS)
        if len(self._buckets) > _FORGET_ABOVE:
            self._buckets.clear()  # each then begins with a full one: no client is the worse for it
        bucket = self._buckets.setdefault(caller, _Bucket(most, now))
        bucket.tokens = min(most, bucket.tokens + rate * (now - bucket.at))
        bucket.at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    # ------------------------------------------------------------------ calls

    def _awaiting(self, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            with self.admit(self._name_of(context)):
                return await behaviour(request, context)

        return call

    def _generating(
        self, behaviour: Callable[..., AsyncIterator[Any]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            with self.admit(self._name_of(context)):
                generator: Any = behaviour(request, context)
                async with aclosing(generator) as responses:
                    async for response in responses:
                        yield response

        return call
