"""The emulated link takes the time, and no more, that a link of its shape would."""

import contextlib
import random
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from lesft_testbed.emulated_link import EmulatedLink, LinkShape
from lesft_testbed.link_calibration import calibrate
from tests.testbed.plain_sockets import Target, connect_to, receive, wait_until

FAST = LinkShape(round_trip_ms=10, up_mbit=200, down_mbit=200)


class Linked:
    """A target behind a link of some shape, and connections to it."""

    def __init__(self, shape: LinkShape, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.target = Target()
        stack.callback(self.target.close)
        self.link = EmulatedLink(self.target.address, shape)
        stack.callback(self.link.close)

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Client's and service's end of a new connection, in use already."""
        client = self._stack.enter_context(connect_to(self.link.address))
        service = self.target.accept()
        for end in (client, service):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ping(client, service)
        return client, service


@contextlib.contextmanager
def linked(shape: LinkShape) -> Iterator[Linked]:
    with contextlib.ExitStack() as stack:
        yield Linked(shape, stack)


def ping(client: socket.socket, service: socket.socket) -> float:
    """Seconds of one byte there and one back."""
    start = time.monotonic()
    client.sendall(b"?")
    assert receive(service, 1) == b"?"
    service.sendall(b"!")
    assert receive(client, 1) == b"!"
    return time.monotonic() - start


def transfer(sender: socket.socket, receiver: socket.socket, data: bytes) -> tuple[bytes, float]:
    """What arrives, and after how many seconds the last of it."""
    start = time.monotonic()
    sending = threading.Thread(target=sender.sendall, args=(data,))
    sending.start()
    arrived = receive(receiver, len(data))
    seconds = time.monotonic() - start
    sending.join()
    return arrived, seconds


def send_until_blocked(sender: socket.socket) -> int:
    """Bytes that it took before it has taken no more for half a second."""
    sent = 0
    sender.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while sent < 50_000_000:
            sent += sender.send(bytes(1 << 16))
    return sent


def mbit_seconds(size: int, mbit: float) -> float:
    return size * 8 / (mbit * 1e6)


# ---------------------------------------------------------------------- delay


@pytest.mark.parametrize("round_trip_ms", [1, 60])
def test_a_ping_takes_the_round_trip_and_hardly_longer(round_trip_ms: float) -> None:
    with linked(LinkShape(round_trip_ms=round_trip_ms, up_mbit=100, down_mbit=100)) as ends:
        client, service = ends.pair()
        times = [ping(client, service) * 1000 for _ in range(15)]
    assert min(times) >= round_trip_ms
    assert statistics.median(times) <= round_trip_ms + 15  # of which the machine may take most


def test_a_connection_takes_a_round_trip_before_its_first_bytes_leave() -> None:
    with linked(LinkShape(round_trip_ms=200, up_mbit=100, down_mbit=100)) as ends:
        start = time.monotonic()
        ends.pair()
        assert 0.4 <= time.monotonic() - start < 0.55


# ---------------------------------------------------------------------- bandwidth


@pytest.mark.parametrize(("way", "mbit"), [("up", 20), ("down", 50)])
def test_bytes_take_their_time_by_the_bandwidth_of_their_direction(way: str, mbit: float) -> None:
    with linked(LinkShape(round_trip_ms=50, up_mbit=20, down_mbit=50)) as ends:
        client, service = ends.pair()
        sender, receiver = (client, service) if way == "up" else (service, client)
        data = random.Random(1).randbytes(2_000_000)
        arrived, seconds = transfer(sender, receiver, data)
    assert arrived == data
    least = mbit_seconds(len(data), mbit) + 0.025
    assert least <= seconds <= least * 1.25 + 0.1


def test_all_connections_of_a_direction_share_its_bandwidth() -> None:
    with linked(LinkShape(round_trip_ms=10, up_mbit=20, down_mbit=20)) as ends:
        pairs = [ends.pair() for _ in range(3)]
        start = time.monotonic()
        ended = [0.0] * len(pairs)

        def run(index: int) -> None:
            transfer(*pairs[index], bytes(500_000))
            ended[index] = time.monotonic() - start

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(pairs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    least = mbit_seconds(1_500_000, 20)
    assert least <= max(ended) <= least * 1.25 + 0.1
    assert min(ended) >= 0.6 * max(ended)  # none was served before the others


def test_the_directions_do_not_wait_for_each_other() -> None:
    with linked(LinkShape(round_trip_ms=10, up_mbit=20, down_mbit=20)) as ends:
        client, service = ends.pair()
        back: list[float] = []
        other = threading.Thread(
            target=lambda: back.append(transfer(service, client, bytes(1_000_000))[1])
        )
        other.start()
        _, there = transfer(client, service, bytes(1_000_000))
        other.join()
    assert max(there, *back) <= mbit_seconds(1_000_000, 20) * 1.25 + 0.1


def test_a_ping_beside_a_transfer_waits_for_the_queue_and_no_longer() -> None:
    shape = LinkShape(round_trip_ms=20, up_mbit=10, down_mbit=10, buffer_ms=100)
    with linked(shape) as ends:
        client, service = ends.pair()
        other, other_service = ends.pair()
        bulk = threading.Thread(target=transfer, args=(other, other_service, bytes(1_000_000)))
        bulk.start()
        time.sleep(0.2)
        seconds = ping(client, service)
        bulk.join()
    assert 0.080 <= seconds <= 0.25


# ---------------------------------------------------------------------- jitter


def test_under_jitter_bytes_arrive_late_but_whole_and_in_order() -> None:
    shape = LinkShape(round_trip_ms=4, up_mbit=100, down_mbit=100, jitter_ms=30, seed=3)
    with linked(shape) as ends:
        client, service = ends.pair()
        data = random.Random(2).randbytes(1_000_000)
        assert transfer(client, service, data)[0] == data
        times = [ping(client, service) * 1000 for _ in range(20)]
    assert min(times) >= 4
    assert 15 <= statistics.mean(times) <= 60  # 4, and twice 15 on average
    assert statistics.stdev(times) >= 4


# ---------------------------------------------------------------------- back-pressure


def test_a_sender_that_nobody_reads_from_is_blocked_and_the_others_are_not() -> None:
    shape = LinkShape(round_trip_ms=20, up_mbit=100, down_mbit=100)
    with linked(shape) as ends:
        client, service = ends.pair()
        other, other_service = ends.pair()
        for end, option in ((client, socket.SO_SNDBUF), (service, socket.SO_RCVBUF)):
            end.setsockopt(socket.SOL_SOCKET, option, 1 << 16)
        sent = send_until_blocked(client)
        capacity = shape.capacity("up")
        assert capacity.under_way_bytes <= sent <= capacity.under_way_bytes + 2_000_000
        assert transfer(other, other_service, b"free" * 1000)[0] == b"free" * 1000
        assert receive(service, sent) == bytes(sent)  # nothing was lost


# ---------------------------------------------------------------------- ends


def test_the_end_of_one_direction_arrives_after_its_bytes_and_leaves_the_other_open() -> None:
    with linked(FAST) as ends:
        client, service = ends.pair()
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert receive(service, 8) == b"question"
        assert service.recv(1) == b""
        service.sendall(b"answer")
        service.close()
        assert receive(client, 6) == b"answer"
        assert client.recv(1) == b""
        wait_until(lambda: ends.link.counts().open_connections == 0)
        counts = ends.link.counts()
    assert (counts.bytes_up, counts.bytes_down) == (9, 7)  # with the ping


def test_a_reset_arrives_as_a_reset_half_a_round_trip_later() -> None:
    with linked(LinkShape(round_trip_ms=200, up_mbit=100, down_mbit=100)) as ends:
        client, service = ends.pair()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        start = time.monotonic()
        client.close()
        with pytest.raises(ConnectionResetError):
            service.recv(1)
        assert 0.1 <= time.monotonic() - start < 0.25
        wait_until(lambda: ends.link.counts().open_connections == 0)


def test_nobody_at_the_target_ends_the_connection() -> None:
    with linked(FAST) as ends:
        ends.target.close()
        with connect_to(ends.link.address) as client:
            assert client.recv(1) == b""


# ---------------------------------------------------------------------- calibration


def test_calibration_measures_each_figure_of_the_shape_and_what_the_proxy_costs() -> None:
    link = EmulatedLink("127.0.0.1:1", LinkShape(round_trip_ms=20, up_mbit=20, down_mbit=80))
    try:
        measured = calibrate(link, seconds=0.4)
    finally:
        link.close()
    assert 20 <= measured.round_trip_ms <= 35
    assert 16 <= measured.up_mbit <= 21
    assert 64 <= measured.down_mbit <= 84
    assert 0 < measured.proxy_seconds_per_100_mb <= 30


def test_a_link_without_bandwidth_is_refused() -> None:
    with pytest.raises(ValidationError, match="up_mbit"):
        LinkShape(round_trip_ms=1, up_mbit=0, down_mbit=1)
