"""Room for the submissions that are being received: bounds memory, whoever comes at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Intake:
    """A number of bytes that all submissions under way share; the rest wait for their turn.

    gRPC's flow control keeps the bytes of those who wait on their side.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def room(self, num_bytes: int) -> AsyncIterator[None]:
        """Waits until so many bytes are free, and holds them as long as the block lasts."""
        assert num_bytes <= self._limit
        async with self._freed:
            await self._freed.wait_for(lambda: self._used + num_bytes <= self._limit)
            self._used += num_bytes
        try:
            yield
        finally:
            async with self._freed:
                self._used -= num_bytes
                self._freed.notify_all()
