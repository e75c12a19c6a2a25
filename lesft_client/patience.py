"""Trying again while a service does not answer, saying so, for a bounded time."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from lesft.errors import Busy, LesftError, Unreachable

log = logging.getLogger(__name__)

T = TypeVar("T")

_SHORTEST_PAUSE_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0

_ANSWERED_SECONDS = 60.0
"""A call that lasted longer had reached its service: gRPC gives up connecting after 20 s, and its
keepalive finds a dead connection within 50."""


class Tries:
    """Tries of one call: how long to pause after each, and when to give up.

    Pauses grow from a fifth of a second to ten seconds, with jitter so that clients do not come all
    at once; the last one ends with the patience. Patience starts anew after a try that `progress`
    differs after, or that waited long for its answer: it is for services that are away, not for
    work that takes its time.
    """

    def __init__(
        self,
        patience_seconds: float,
        progress: Callable[[], int] = lambda: 0,
        option: str = "--patience-seconds",
    ) -> None:
        """`option` is what sets the patience, for the message that it has ended."""
        self._patience_seconds = patience_seconds
        self._progress = progress
        self._option = option
        self._began = time.monotonic()
        self._start_anew(self._began)

    def _start_anew(self, now: float) -> None:
        self._since = now
        self._next_pause = _FIRST_PAUSE_SECONDS
        self._done = self._progress()

    def begin(self) -> None:
        """A try begins."""
        self._began = time.monotonic()

    def pause_after(self, error: LesftError) -> float:
        """Seconds to wait after a try that failed. Raises the error when patience has ended."""
        now = time.monotonic()
        if now - self._began > _ANSWERED_SECONDS or self._progress() != self._done:
            self._start_anew(now)
        waited = now - self._since
        if waited > self._patience_seconds - _SHORTEST_PAUSE_SECONDS:
            asked = "" if isinstance(error, Busy) else "is it running and is the address right? "
            raise type(error)(
                f"{error} (tried for {waited:.0f} s; {asked}{self._option} waits longer)"
            ) from None
        pause = min(self._next_pause * random.uniform(0.8, 1.2), self._patience_seconds - waited)
        self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE_SECONDS)
        log.warning("%s; trying again in %.1f s", error, pause)
        return pause


def patiently(
    call: Callable[[], T],
    patience_seconds: float,
    still_wanted: Callable[[], None] = lambda: None,
    progress: Callable[[], int] = lambda: 0,
    option: str = "--patience-seconds",
) -> T:
    """Call until it no longer raises Unreachable; only for calls that are safe to repeat.

    `still_wanted` is asked before each new try, and raises when nothing would come of one. When
    patience has ended it raises the last Unreachable, with the time spent.
    """
    tries = Tries(patience_seconds, progress, option)
    while True:
        tries.begin()
        try:
            return call()
        except Unreachable as error:
            still_wanted()
            pause = tries.pause_after(error)
        time.sleep(pause)
