"""What one direction of one connection has under way: bounded, in order, each with its time."""

import asyncio
from collections import deque


class UnderWay:
    """Pieces of a stream between two ends. For one task that adds and one that delivers.

    An empty piece is the end of the stream.
    """

    def __init__(self, limit_bytes: int) -> None:
        """A piece larger than `limit_bytes` goes alone."""
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._latest_due = 0.0
        self._added, self._freed = asyncio.Event(), asyncio.Event()

    async def room(self, size: int) -> None:
        """Wait until so many more bytes may be added."""
        while self._bytes and self._bytes + size > self._limit_bytes:
            self._freed.clear()
            await self._freed.wait()

    def add(self, due: float, piece: bytes) -> None:
        """Send a piece out, to arrive at `due` in the loop's time, never before earlier ones."""
        self._latest_due = max(self._latest_due, due)
        self._bytes += len(piece)
        self._pieces.append((self._latest_due, piece))
        self._added.set()

    async def arrival(self) -> bytes:
        """All bytes whose time has come, as one piece, once there are any; or the end.

        They keep their room until `free`.
        """
        while not self._pieces:
            self._added.clear()
            await self._added.wait()
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._pieces[0][0] - loop.time())
        arrived, now = [self._pieces.popleft()[1]], loop.time()
        while arrived[0] and self._pieces and self._pieces[0][1] and self._pieces[0][0] <= now:
            arrived.append(self._pieces.popleft()[1])
        return arrived[0] if len(arrived) == 1 else b"".join(arrived)

    def free(self, size: int) -> None:
        """These bytes are no longer under way."""
        self._bytes -= size
        self._freed.set()
