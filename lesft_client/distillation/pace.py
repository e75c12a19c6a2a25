"""When the next request may go out: a rate limit, pauses after failures, and how long to try on."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lesft.errors import Unreachable

_SHORTEST_WAIT_SECONDS = 0.001
"""Waits that rounding makes shorter would only spin."""


@dataclass(frozen=True)
class Clock:
    """Seconds that only grow, and waiting for some of them to pass."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclass(frozen=True)
class Backoff:
    """Pauses that double from `first_seconds` to `longest_seconds`, with jitter."""

    first_seconds: float = 1.0
    longest_seconds: float = 60.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row; half of it is drawn at random."""
        doubled = self.first_seconds * 2.0 ** min(failures - 1, 60)
        return min(doubled, self.longest_seconds) * random.uniform(0.5, 1.0)


class Pace:
    """A token bucket that holds one second's requests, and a hold on all of them."""

    def __init__(self, requests_per_minute: float, clock: Clock) -> None:
        """`requests_per_minute` 0 sets no limit."""
        self._per_second = requests_per_minute / 60
        self._capacity = max(1.0, self._per_second)
        self._clock = clock
        self._tokens = self._capacity
        self._filled_at = clock.now()
        self._held_until = clock.now()

    async def turn(self) -> None:
        """Wait until one more request may go out, and count it."""
        while (wait := self._wait_seconds()) > 0:
            await self._clock.sleep(max(wait, _SHORTEST_WAIT_SECONDS))
        self._tokens -= 1

    def hold(self, seconds: float) -> None:
        """Let no request out for so long: the service has asked for it."""
        self._held_until = max(self._held_until, self._clock.now() + seconds)

    def _wait_seconds(self) -> float:
        now = self._clock.now()
        if now < self._held_until:
            return self._held_until - now
        if not self._per_second:
            return 0.0
        earned = (now - self._filled_at) * self._per_second
        self._tokens = min(self._capacity, self._tokens + earned)
        self._filled_at = now
        return max(0.0, (1 - self._tokens) / self._per_second)


class Patience:
    """Counts how long nothing but failures has come back, whichever request they were for."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._seconds = seconds
        self._clock = clock
        self._failing_since: float | None = None

    def succeeded(self) -> None:
        """A request was answered: patience starts anew with the next failure."""
        self._failing_since = None

    async def pause(self, seconds: float, failure: str) -> None:
        """Wait before trying again after a failure.

        Raises Unreachable with the failure once patience has run out; the wait ends there.
        """
        if self._failing_since is None:
            self._failing_since = self._clock.now()
        until = self._clock.now() + seconds
        while (left := until - self._clock.now()) > 0:
            await self._clock.sleep(min(left, max(self._left_seconds, _SHORTEST_WAIT_SECONDS)))
            if self._left_seconds <= 0:
                raise Unreachable(
                    f"{failure} (nothing else for {self._seconds:g} s; is it running and is the "
                    "address right? --patience-seconds tries longer)"
                )

    @property
    def _left_seconds(self) -> float:
        if self._failing_since is None:
            return self._seconds
        return self._seconds - (self._clock.now() - self._failing_since)
