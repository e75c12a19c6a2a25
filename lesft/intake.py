"""Room for the bundles that are being received: bounds memory, whoever comes at once."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lesft.errors import TooLarge


class Intake:
    """A number of bytes that all bundles under way share; the rest wait for their turn.

    gRPC's flow control keeps the bytes of those who wait on their side, but for a window each.
    """

    def __init__(self, limit_bytes: int, option: str) -> None:
        """`option` is the setting that lays the limit down."""
        self.limit_bytes = limit_bytes
        self._option = option
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.used_bytes = 0
        """Bytes that are held now."""

    @property
    def num_waiting(self) -> int:
        """Bundles that wait for room."""
        return len(self._waiting)

    @asynccontextmanager
    async def room(self, num_bytes: int) -> AsyncIterator[None]:
        """Waits until so many bytes are free, and holds them as long as the block lasts.

        Raises TooLarge for more than there can ever be.
        """
        if num_bytes > self.limit_bytes:
            raise TooLarge(
                f"bundle of {num_bytes} bytes announced, but all that are being received may have "
                f"{self.limit_bytes} together: raise {self._option}"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        self._let_in()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self.used_bytes -= num_bytes
            elif (num_bytes, turn) in self._waiting:
                self._waiting.remove((num_bytes, turn))
            self._let_in()

    def _let_in(self) -> None:
        """Whoever waits longest is let in first, however small the others are."""
        while self._waiting and self.used_bytes + self._waiting[0][0] <= self.limit_bytes:
            num_bytes, turn = self._waiting.popleft()
            if not turn.cancelled():
                self.used_bytes += num_bytes
                turn.set_result(None)
