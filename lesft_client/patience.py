"""Trying again while a service does not answer, saying so, for a bounded time."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from lesft.errors import Unreachable

log = logging.getLogger(__name__)

T = TypeVar("T")

_SHORTEST_PAUSE_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0

_ANSWERED_SECONDS = 60.0
"""A call that lasted longer had reached its service: gRPC gives up connecting after 20 s, and its
keepalive finds a dead connection within 50."""


def patiently(
    call: Callable[[], T],
    patience_seconds: float,
    still_wanted: Callable[[], None] = lambda: None,
    progress: Callable[[], int] = lambda: 0,
    option: str = "--patience-seconds",
) -> T:
    """Call until it no longer raises Unreachable; only for calls that are safe to repeat.

    `still_wanted` is asked before each new try, and raises when nothing would come of one.
    Pauses grow from a fifth of a second to ten seconds, with jitter so that clients do not come all
    at once; the last one ends with the patience. Then it raises the last Unreachable, with the time
    spent and the `option` that sets the patience.
    Patience starts anew after a call that `progress` differs after, or that waited long for its
    answer: it is for services that are away, not for work that takes its time.
    """
    since, next_pause, done = time.monotonic(), _FIRST_PAUSE_SECONDS, progress()
    while True:
        began = time.monotonic()
        try:
            return call()
        except Unreachable as error:
            still_wanted()
            now = time.monotonic()
            if now - began > _ANSWERED_SECONDS or progress() != done:
                since, next_pause, done = now, _FIRST_PAUSE_SECONDS, progress()
            waited = now - since
            if waited > patience_seconds - _SHORTEST_PAUSE_SECONDS:
                raise Unreachable(
                    f"{error} (tried for {waited:.0f} s; is it running and is the address right? "
                    f"{option} waits longer)"
                ) from None
            pause = min(next_pause * random.uniform(0.8, 1.2), patience_seconds - waited)
            log.warning("%s; trying again in %.1f s", error, pause)
        time.sleep(pause)
        next_pause = min(2 * next_pause, _LONGEST_PAUSE_SECONDS)
