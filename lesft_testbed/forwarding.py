"""Forwarding of TCP connections: what all proxies of the testbed have in common."""

import asyncio
import contextlib
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lesft.channel import split_address
from lesft_testbed.under_way import UnderWay

Direction = Literal["up", "down"]
"""up is from whoever connected to the target, down is back."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

T = TypeVar("T")


@dataclass(frozen=True)
class ProxyCounts:
    """What went through a proxy. Bytes are those delivered."""

    connections: int
    open_connections: int
    bytes_up: int
    bytes_down: int


@dataclass(eq=False)
class Connection:
    """One connection from a client, and ours to the target once there is one."""

    client: asyncio.StreamWriter
    target: asyncio.StreamWriter | None = None
    cut: bool = False
    swallowed: set[Direction] = field(default_factory=set)
    """Directions whose bytes, and whose end, never arrive."""

    def reset(self) -> None:
        """Close both ends at once, with RST."""
        self.cut = True
        for end in (self.client, self.target):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
                    )
                end.transport.abort()

    def close(self) -> None:
        """Close both ends in order, once what was written has gone out."""
        for end in (self.client, self.target):
            if end is not None:
                end.close()


@dataclass(frozen=True)
class Capacity:
    """What a proxy takes in, of one direction."""

    piece_bytes: int
    """Most that is read at once, and gets one time of delivery."""
    under_way_bytes: int
    """Most that one connection has in the proxy; then its sender has to wait."""
    socket_bytes: int = 0
    """The kernel's buffers of each connection; 0 leaves them to the system."""


class Forwarder(ABC):
    """Forwards a port of 127.0.0.1 to a target, on an event loop in a thread of its own.

    All public methods may be called from any thread, and return when what they ask for is so.
    """

    def __init__(
        self,
        target: str,
        up: Capacity,
        down: Capacity,
        loop: asyncio.AbstractEventLoop | None = None,
        handshake_seconds: float = 0.0,
    ) -> None:
        """`target` is HOST:PORT, and need not listen yet.

        A subclass calls this last: connections come from then on.
        """
        self._target = split_address(target)
        self._capacity: dict[Direction, Capacity] = {"up": up, "down": down}
        self._handshake_seconds = handshake_seconds
        self._connections: set[Connection] = set()
        self._accepted = 0
        self._bytes: dict[Direction, int] = {"up": 0, "down": 0}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = loop or asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        listening = asyncio.start_server(self._accept, "127.0.0.1", 0, limit=up.piece_bytes)
        self._server = self._do(listening)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    # ------------------------------------------------------------------ what others ask for

    def retarget(self, target: str) -> None:
        """Forward connections to come to another HOST:PORT."""

        async def retarget() -> None:
            self._target = split_address(target)

        self._do(retarget())

    def counts(self) -> ProxyCounts:
        """What went through so far."""

        async def counts() -> ProxyCounts:
            return ProxyCounts(
                self._accepted, len(self._connections), self._bytes["up"], self._bytes["down"]
            )

        return self._do(counts())

    def close(self) -> None:
        """Stop listening, reset all connections and end the thread. Again is harmless."""
        if self._loop.is_closed():
            return

        async def close() -> None:
            self._server.close()
            for connection in list(self._connections):
                connection.reset()
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._do(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ------------------------------------------------------------------ on the event loop

    @abstractmethod
    async def _due(self, direction: Direction, size: int) -> float:
        """When a piece of `size` bytes arrives, in the loop's time; waits until it may set out."""

    def _admit(self, connection: Connection) -> bool:
        """Whether to forward a new connection at all; if not, it is reset."""
        return True

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        self._accepted += 1
        if not self._admit(connection):
            connection.reset()
            return
        self._connections.add(connection)
        task = self._loop.create_task(self._forward(connection, reader))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, connection: Connection, from_client: asyncio.StreamReader) -> None:
        """One connection, from the call to the target to the end of both directions."""
        down = self._capacity["down"]
        try:
            await asyncio.sleep(self._handshake_seconds / 2)
            from_target, connection.target = await asyncio.open_connection(
                *self._target, limit=down.piece_bytes
            )
            if connection.cut:
                return
            self._bound_buffers(connection.client, received="up", sent="down")
            self._bound_buffers(connection.target, received="down", sent="up")
            await asyncio.sleep(self._handshake_seconds / 2)
            await asyncio.gather(
                self._pump(connection, "up", from_client, connection.target),
                self._pump(connection, "down", from_target, connection.client),
            )
        except OSError:
            pass  # the target is away: the client's connection ends too
        finally:
            if connection.cut:
                connection.reset()  # the target may have answered only now
            else:
                connection.close()
            self._connections.discard(connection)

    def _bound_buffers(
        self, end: asyncio.StreamWriter, received: Direction, sent: Direction
    ) -> None:
        """Where a capacity says so, the kernel shall not hold much beside what is under way."""
        options = ((socket.SO_RCVBUF, received), (socket.SO_SNDBUF, sent))
        for option, direction in options:
            size = self._capacity[direction].socket_bytes
            if size:
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, size)
        if self._capacity[sent].socket_bytes:
            end.transport.set_write_buffer_limits(high=0)

    async def _pump(
        self,
        connection: Connection,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Read ahead, as far as there is room, and deliver each piece when its time has come."""
        capacity = self._capacity[direction]
        under_way = UnderWay(capacity.under_way_bytes)
        delivery = self._loop.create_task(self._deliver(connection, direction, under_way, writer))
        piece = b"-"
        try:
            while piece:
                try:
                    piece = await reader.read(capacity.piece_bytes)
                except OSError:
                    # A reset overtakes bytes that nobody reads, but takes as long as they.
                    await asyncio.sleep(await self._due(direction, 0) - self._loop.time())
                    if direction not in connection.swallowed:
                        connection.reset()
                        return
                    piece = b""
                await under_way.room(len(piece))
                under_way.add(await self._due(direction, len(piece)), piece)
            await delivery
        finally:
            delivery.cancel()

    async def _deliver(
        self,
        connection: Connection,
        direction: Direction,
        under_way: UnderWay,
        writer: asyncio.StreamWriter,
    ) -> None:
        piece, gone = b"-", False
        while piece:
            piece = await under_way.arrival()
            if not gone and direction not in connection.swallowed:
                try:
                    await self._write(direction, piece, writer)
                except OSError:
                    gone = True
                    if not connection.swallowed:
                        connection.reset()
            under_way.free(len(piece))

    async def _write(
        self, direction: Direction, piece: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if piece:
            writer.write(piece)
            self._bytes[direction] += len(piece)
            await writer.drain()
        elif writer.can_write_eof():
            writer.write_eof()
