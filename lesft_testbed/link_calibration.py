"""What an emulated link really gives, measured by plain sockets through it."""

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lesft.channel import split_address
from lesft_testbed.emulated_link import EmulatedLink
from lesft_testbed.forwarding import Direction

_PINGS = 20
_RECEIVE_BYTES = 1 << 20
_PATIENCE_SECONDS = 60


@dataclass(frozen=True)
class MeasuredLink:
    """Figures of one calibration."""

    round_trip_ms: float
    """Median of one byte there and one back, with nothing else under way."""
    up_mbit: float
    """Of a bulk transfer, once its first bytes have arrived."""
    down_mbit: float
    proxy_seconds_per_100_mb: float
    """Processor time of the proxy while both transfers ran."""


def calibrate(link: EmulatedLink, seconds: float = 2.0) -> MeasuredLink:
    """Measure pings, then a transfer each way of about `seconds`.

    The link's target is another one afterwards: `retarget` it.
    """
    with _pair(link) as (client, service):
        round_trip_ms = _round_trip(client, service) * 1000
        sizes = {way: _transfer_bytes(link, way, seconds) for way in ("up", "down")}
        before = link.cpu_seconds()
        up = _transfer(client, service, sizes["up"])
        down = _transfer(service, client, sizes["down"])
        used = link.cpu_seconds() - before
    return MeasuredLink(
        round_trip_ms, up * 8e-6, down * 8e-6, used / sum(sizes.values()) * 100_000_000
    )


@contextlib.contextmanager
def _pair(link: EmulatedLink) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of one connection through the link."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(_PATIENCE_SECONDS)
        link.retarget(f"127.0.0.1:{listening.getsockname()[1]}")
        with socket.create_connection(split_address(link.address)) as client:
            service, _ = listening.accept()
            with service:
                for end in (client, service):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    end.settimeout(_PATIENCE_SECONDS)
                yield client, service


def _round_trip(client: socket.socket, service: socket.socket) -> float:
    """Median seconds of a ping, the first ones aside: the handshake may still be under way."""
    times = []
    for _ in range(_PINGS):
        start = time.monotonic()
        client.sendall(b"?")
        service.recv(1)
        service.sendall(b"!")
        client.recv(1)
        times.append(time.monotonic() - start)
    return statistics.median(times[1:])


def _transfer_bytes(link: EmulatedLink, direction: Direction, seconds: float) -> int:
    return int(link.shape.bytes_per_second(direction) * seconds)


def _transfer(sender: socket.socket, receiver: socket.socket, size: int) -> float:
    """Bytes per second as they arrive."""
    sending = threading.Thread(target=sender.sendall, args=(bytes(size),), daemon=True)
    sending.start()
    first = received = len(receiver.recv(_RECEIVE_BYTES))
    start = time.monotonic()
    while received < size:
        count = len(receiver.recv(_RECEIVE_BYTES))
        if not count:
            raise ConnectionError(f"the transfer ended after {received} of {size} bytes")
        received += count
    seconds = time.monotonic() - start
    sending.join()
    return (received - first) / seconds
