"""Trying again while a service does not answer, saying so, for a bounded time."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from lesft.errors import Unreachable

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0


def patiently(call: Callable[[], T], patience_seconds: float) -> T:
    """Call until it no longer raises Unreachable; only for calls that are safe to repeat.

    Pauses grow from half a second to ten, with jitter so that clients do not come all at once.
    Raises the last Unreachable, with the time spent, when patience is at its end.
    """
    start, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
    while True:
        try:
            return call()
        except Unreachable as error:
            waited = time.monotonic() - start
            if waited + pause > patience_seconds:
                raise Unreachable(
                    f"{error} (tried for {waited:.0f} s; is it running and is the address right? "
                    "--patience-seconds waits longer)"
                ) from None
            log.warning("%s; trying again in %.1f s", error, pause)
        time.sleep(pause * random.uniform(0.8, 1.2))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
