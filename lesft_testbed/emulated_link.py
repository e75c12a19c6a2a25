"""A TCP proxy that gives every byte the time that it would take over a link.

Modelled are round trip, bandwidth each way, jitter and a bounded queue in front of the bandwidth,
which all connections share. Bandwidth is that of payload: headers take none, nothing is lost, and
a connection does not start slowly.
"""

import asyncio
import random
import selectors
import time

from pydantic import BaseModel, ConfigDict, Field

from lesft_testbed.forwarding import Capacity, Direction, Forwarder

_PIECE_SECONDS = 0.004
"""Of bandwidth that one piece takes: a timer a piece is what this costs."""

_PIECE_BYTES = (1448, 1 << 17)
"""A piece is not smaller than what one packet carries."""

_SOCKET_SECONDS, _SOCKET_BYTES = 0.01, (1 << 16, 1 << 20)


class LinkShape(BaseModel):
    """What a link is like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round_trip_ms: float = Field(ge=0, description="Round trip in ms, half of it each way.")
    up_mbit: float = Field(gt=0, description="Bandwidth towards the target in Mbit/s.")
    down_mbit: float = Field(gt=0, description="Bandwidth back in Mbit/s.")
    jitter_ms: float = Field(
        0.0, ge=0, description="Each piece is late by up to this many ms more; none overtakes."
    )
    buffer_ms: float = Field(
        20.0, gt=0, description="Queue in front of each bandwidth, in ms of that bandwidth."
    )
    seed: int = Field(0, description="Seed of the jitter.")

    def bytes_per_second(self, direction: Direction) -> float:
        """Bandwidth of one direction."""
        return (self.up_mbit if direction == "up" else self.down_mbit) * 1e6 / 8

    def capacity(self, direction: Direction) -> Capacity:
        """What one connection may have under way: bandwidth-delay product and the queue."""
        rate = self.bytes_per_second(direction)
        under_way = rate * (self.round_trip_ms + self.jitter_ms + self.buffer_ms) / 1000
        piece = _within(rate * _PIECE_SECONDS, _PIECE_BYTES)
        return Capacity(
            piece, int(under_way) + piece, _within(rate * _SOCKET_SECONDS, _SOCKET_BYTES)
        )


class _Lane:
    """One direction of the link: a queue before a bandwidth before a delay."""

    def __init__(self, shape: LinkShape, direction: Direction) -> None:
        self._bytes_per_second = shape.bytes_per_second(direction)
        self._delay_seconds = shape.round_trip_ms / 2000
        self._jitter_seconds = shape.jitter_ms / 1000
        self._buffer_seconds = shape.buffer_ms / 1000
        self._random = random.Random(f"{shape.seed} {direction}")
        self._free_at = 0.0
        self._turn = asyncio.Lock()

    async def arrival(self, size: int) -> float:
        """When so many bytes are through; returns once they are in the queue, in turn."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            wait = self._free_at - self._buffer_seconds - loop.time()
            if size and wait > 0:
                await asyncio.sleep(wait)
            self._free_at = max(self._free_at, loop.time()) + size / self._bytes_per_second
        late = self._random.uniform(0, self._jitter_seconds)
        return self._free_at + self._delay_seconds + late


class EmulatedLink(Forwarder):
    """Forwards a port of 127.0.0.1 to a target, as a link of some shape would."""

    def __init__(self, target: str, shape: LinkShape) -> None:
        """`target` is HOST:PORT, and need not listen yet."""
        self.shape = shape
        self._lanes: dict[Direction, _Lane] = {
            "up": _Lane(shape, "up"),
            "down": _Lane(shape, "down"),
        }
        super().__init__(
            target,
            shape.capacity("up"),
            shape.capacity("down"),
            # select() waits by the microsecond, epoll and poll by the millisecond.
            asyncio.SelectorEventLoop(selectors.SelectSelector()),
            handshake_seconds=shape.round_trip_ms / 1000,
        )

    async def _due(self, direction: Direction, size: int) -> float:
        return await self._lanes[direction].arrival(size)

    def cpu_seconds(self) -> float:
        """Processor time that the link has taken so far."""

        async def cpu_seconds() -> float:
            return time.thread_time()

        return self._do(cpu_seconds())


def _within(value: float, bounds: tuple[int, int]) -> int:
    lowest, highest = bounds
    return int(min(max(value, lowest), highest))
