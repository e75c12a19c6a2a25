"""A TCP proxy that breaks the connections through it on request, as bad networks do."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lesft.channel import split_address

Direction = Literal["up", "down"]
"""up is from whoever connected to the target, down is back."""

_CHUNK_BYTES = 1 << 16
_CHUNKS_UNDER_WAY = 64
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_BOTH: frozenset[Direction] = frozenset({"up", "down"})

T = TypeVar("T")


@dataclass(frozen=True)
class ProxyCounts:
    """What went through a proxy. Bytes are those delivered."""

    connections: int
    open_connections: int
    bytes_up: int
    bytes_down: int


@dataclass(eq=False)
class _Connection:
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


class FaultProxy:
    """Forwards a port of 127.0.0.1 to a target, on an event loop in a thread of its own.

    All methods may be called from any thread, and return when what they ask for is so.
    """

    def __init__(self, target: str, latency_seconds: float = 0.0) -> None:
        """`target` is HOST:PORT, and need not listen yet. Every byte takes `latency_seconds`."""
        self._target = split_address(target)
        self._latency = latency_seconds
        self._refusing_until = 0.0
        self._held_seconds, self._held_until = 0.0, 0.0
        self._swallowing: frozenset[Direction] = frozenset()
        self._swallowing_until = 0.0
        self._connections: set[_Connection] = set()
        self._accepted = 0
        self._bytes: dict[Direction, int] = {"up": 0, "down": 0}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    # ------------------------------------------------------------------ what others ask for

    def retarget(self, target: str) -> None:
        """Forward connections to come to another HOST:PORT."""

        async def retarget() -> None:
            self._target = split_address(target)

        self._do(retarget())

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

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._accepted += 1
        now = self._loop.time()
        if now < self._refusing_until:
            connection.reset()
            return
        if now < self._swallowing_until:
            connection.swallowed |= self._swallowing
            self._loop.call_at(self._swallowing_until, _silence, [connection])
        self._connections.add(connection)
        task = self._loop.create_task(self._forward(connection, reader))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, connection: _Connection, from_client: asyncio.StreamReader) -> None:
        """One connection, from the call to the target to the end of both directions."""
        try:
            from_target, connection.target = await asyncio.open_connection(*self._target)
            if connection.cut:
                return
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

    async def _pump(
        self,
        connection: _Connection,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Read ahead and deliver each chunk when its time has come."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_UNDER_WAY)
        delivery = self._loop.create_task(self._deliver(connection, direction, under_way, writer))
        try:
            chunk = b"-"
            while chunk:
                try:
                    chunk = await reader.read(_CHUNK_BYTES)
                except OSError:
                    if direction not in connection.swallowed:
                        connection.reset()
                        return
                    chunk = b""
                await under_way.put((self._due(), chunk))
            await delivery
        finally:
            delivery.cancel()

    def _due(self) -> float:
        now = self._loop.time()
        held = self._held_seconds if now < self._held_until else 0.0
        return now + self._latency + held

    async def _deliver(
        self,
        connection: _Connection,
        direction: Direction,
        under_way: "asyncio.Queue[tuple[float, bytes]]",
        writer: asyncio.StreamWriter,
    ) -> None:
        chunk, gone = b"-", False
        while chunk:
            due, chunk = await under_way.get()
            await asyncio.sleep(due - self._loop.time())
            if gone or direction in connection.swallowed:
                continue
            try:
                if chunk:
                    writer.write(chunk)
                    self._bytes[direction] += len(chunk)
                    await writer.drain()
                elif writer.can_write_eof():
                    writer.write_eof()
            except OSError:
                gone = True
                if not connection.swallowed:
                    connection.reset()


def _silence(connections: list[_Connection]) -> None:
    for connection in connections:
        connection.swallowed |= _BOTH
