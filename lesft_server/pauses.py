"""Lets a client wait that opens session after session and hands nothing in."""

from collections import Counter

_FREE_SESSIONS = 3
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 2.0)
"""Seconds before each session after those, and the last before all others."""

_FORGET_ABOVE = 10_000
"""Clients: without TLS, strangers may make up any number of names."""


class Pauses:
    """Sessions cost the other clients time. Lives on the event loop."""

    def __init__(self) -> None:
        self._in_vain: Counter[str] = Counter()

    def seconds(self, client_id: str) -> float:
        """How long a client waits for its next session: none at first, then longer each time."""
        doublings = self._in_vain[client_id] - _FREE_SESSIONS
        return 0.0 if doublings < 0 else _PAUSES[min(doublings, len(_PAUSES) - 1)]

    def came_in_vain(self, client_id: str) -> None:
        """A session was refused, or has ended, and nothing was handed in."""
        if len(self._in_vain) > _FORGET_ABOVE:
            self._in_vain.clear()
        self._in_vain[client_id] += 1

    def handed_in(self, client_id: str) -> None:
        """It does its part."""
        self._in_vain.pop(client_id, None)
