"""A TCP proxy that breaks the connections through it on request, as bad networks do."""

from typing import Literal

from lesft_testbed.forwarding import Capacity, Connection, Direction, Forwarder

_CHUNK_BYTES = 1 << 16
_CHUNKS_UNDER_WAY = 64
_CAPACITY = Capacity(_CHUNK_BYTES, _CHUNK_BYTES * _CHUNKS_UNDER_WAY)
_BOTH: frozenset[Direction] = frozenset({"up", "down"})


class FaultProxy(Forwarder):
    """Forwards a port of 127.0.0.1 to a target, and disturbs what it forwards.

    All methods may be called from any thread, and return when what they ask for is so.
    """

    def __init__(self, target: str, latency_seconds: float = 0.0) -> None:
        """`target` is HOST:PORT, and need not listen yet. Every byte takes `latency_seconds`."""
        self._latency = latency_seconds
        self._refusing_until = 0.0
        self._held_seconds, self._held_until = 0.0, 0.0
        self._swallowing: frozenset[Direction] = frozenset()
        self._swallowing_until = 0.0
        super().__init__(target, _CAPACITY, _CAPACITY)

    def cut(self, seconds: float = 0.0) -> None:
        """Reset all connections; close new ones at once for so long."""

        async def cut() -> None:
            self._refusing_until = self._loop.time() + seconds
            for connection in list(self._connections):
                connection.reset()

        self._do(cut())

    def delay(self, seconds: float, duration: float) -> None:
        """Hold back by `seconds` every byte that comes within the next `duration` seconds."""

        async def delay() -> None:
            self._held_seconds, self._held_until = seconds, self._loop.time() + duration

        self._do(delay())

    def half_open(
        self,
        duration: float,
        direction: Literal["up", "down", "both"] = "both",
        new_connections: bool = True,
    ) -> None:
        """Leave all connections open, but deliver nothing more in this direction.

        What is swallowed is lost, the end of a stream too, so after `duration` seconds these
        connections are silent in both directions, for good. New ones are healthy; without
        `new_connections`, only those made after `duration`.
        """
        swallowed = _BOTH if direction == "both" else frozenset({direction})

        async def half_open() -> None:
            victims = list(self._connections)
            for connection in victims:
                connection.swallowed |= swallowed
            self._loop.call_later(duration, _silence, victims)
            if not new_connections:
                self._swallowing = swallowed
                self._swallowing_until = self._loop.time() + duration

        self._do(half_open())

    # ------------------------------------------------------------------ on the event loop

    def _admit(self, connection: Connection) -> bool:
        now = self._loop.time()
        if now < self._refusing_until:
            return False
        if now < self._swallowing_until:
            connection.swallowed |= self._swallowing
            self._loop.call_at(self._swallowing_until, _silence, [connection])
        return True

    async def _due(self, direction: Direction, size: int) -> float:
        now = self._loop.time()
        held = self._held_seconds if now < self._held_until else 0.0
        return now + self._latency + held


def _silence(connections: list[Connection]) -> None:
    for connection in connections:
        connection.swallowed |= _BOTH
