"""Plain sockets at both ends of a proxy."""

import socket
import time
from collections.abc import Callable

PATIENCE_SECONDS = 10


class Target:
    """A service that keeps its accepted connections, in the order they came."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(PATIENCE_SECONDS)
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.accepted: list[socket.socket] = []

    def accept(self) -> socket.socket:
        connection, _ = self._listening.accept()
        connection.settimeout(PATIENCE_SECONDS)
        self.accepted.append(connection)
        return connection

    def close(self) -> None:
        self._listening.close()
        for connection in self.accepted:
            connection.close()


def connect_to(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), PATIENCE_SECONDS)


def receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        assert chunk, f"ended after {len(data)} bytes: {bytes(data[-100:])!r}"
        data += chunk
    return bytes(data)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
