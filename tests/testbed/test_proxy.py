"""The proxy breaks connections as real networks do, seen from plain sockets at both ends."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lesft_testbed.proxy import FaultProxy
from tests.testbed.plain_sockets import (
    PATIENCE_SECONDS,
    Target,
    connect_to,
    receive,
    wait_until,
)

SILENCE_SECONDS = 0.3
"""How long nothing must come where nothing may come."""


@pytest.fixture
def target() -> Iterator[Target]:
    service = Target()
    yield service
    service.close()


@pytest.fixture
def proxy(target: Target) -> Iterator[FaultProxy]:
    running = FaultProxy(target.address)
    yield running
    running.close()


@pytest.fixture
def connect() -> Iterator[Callable[[FaultProxy], socket.socket]]:
    """Connects to a proxy; all connections are closed after the test."""
    with contextlib.ExitStack() as stack:

        def connect(proxy: FaultProxy) -> socket.socket:
            return stack.enter_context(connect_to(proxy.address))

        yield connect


Connect = Callable[[FaultProxy], socket.socket]


def is_silent(connection: socket.socket) -> bool:
    """Open, but nothing comes."""
    connection.settimeout(SILENCE_SECONDS)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(PATIENCE_SECONDS)
    return False


def works(client: socket.socket, service: socket.socket) -> bool:
    client.sendall(b"question")
    service.sendall(b"answer")
    return receive(service, 8) == b"question" and receive(client, 6) == b"answer"


# ---------------------------------------------------------------------- nothing broken


def test_bytes_and_ends_pass_in_both_directions_and_are_counted(
    target: Target, proxy: FaultProxy, connect: Connect
) -> None:
    client = connect(proxy)
    service = target.accept()
    question, answer = bytes(range(256)) * 20_000, b"yes" * 1000
    sender = threading.Thread(target=client.sendall, args=(question,))
    sender.start()
    assert receive(service, len(question)) == question
    sender.join()
    client.shutdown(socket.SHUT_WR)
    assert service.recv(1) == b""
    assert proxy.counts().open_connections == 1
    service.sendall(answer)  # the other direction is open still
    service.close()
    assert receive(client, len(answer)) == answer
    assert client.recv(1) == b""
    wait_until(lambda: proxy.counts().open_connections == 0)
    counts = proxy.counts()
    assert (counts.connections, counts.bytes_up, counts.bytes_down) == (
        1,
        len(question),
        len(answer),
    )


def test_the_death_of_the_target_reaches_the_client_and_retarget_finds_its_successor(
    target: Target, proxy: FaultProxy, connect: Connect
) -> None:
    client = connect(proxy)
    target.accept()
    target.close()
    assert client.recv(1) == b""
    assert connect(proxy).recv(1) == b""  # nobody listens there now
    successor = Target()
    proxy.retarget(successor.address)
    assert works(connect(proxy), successor.accept())
    successor.close()


def test_a_latency_holds_every_byte_but_only_once(target: Target, connect: Connect) -> None:
    slow = FaultProxy(target.address, latency_seconds=0.3)
    client = connect(slow)
    service = target.accept()
    start = time.monotonic()
    for letter in (b"a", b"b", b"c"):
        client.sendall(letter)
        time.sleep(0.1)
    assert receive(service, 3) == b"abc"
    assert 0.5 <= time.monotonic() - start < 0.8  # the last one left at 0.2
    slow.close()


# ---------------------------------------------------------------------- cut


def test_a_cut_resets_both_ends_and_new_connections_work(
    target: Target, proxy: FaultProxy, connect: Connect
) -> None:
    client = connect(proxy)
    service = target.accept()
    assert works(client, service)
    proxy.cut()
    for end in (client, service):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    assert works(connect(proxy), target.accept())
    assert proxy.counts().connections == 2


def test_a_longer_cut_refuses_new_connections_that_long(
    target: Target, proxy: FaultProxy, connect: Connect
) -> None:
    proxy.cut(0.5)
    start = time.monotonic()
    with pytest.raises(ConnectionResetError):
        connect(proxy).recv(1)
    assert time.monotonic() - start < 0.4
    time.sleep(0.6)
    assert works(connect(proxy), target.accept())


# ---------------------------------------------------------------------- delay


def test_a_delay_holds_bytes_back_in_order_and_ends(
    target: Target, proxy: FaultProxy, connect: Connect
) -> None:
    client = connect(proxy)
    service = target.accept()
    assert works(client, service)
    proxy.delay(0.5, duration=0.2)
    start = time.monotonic()
    client.sendall(b"held")
    time.sleep(0.3)
    client.sendall(b"behind it")
    assert receive(service, 13) == b"heldbehind it"
    assert 0.5 <= time.monotonic() - start < 0.9
    start = time.monotonic()
    assert works(client, service)
    assert time.monotonic() - start < 0.3


# ---------------------------------------------------------------------- half open


@pytest.mark.parametrize("direction", ["up", "down", "both"])
def test_a_half_open_link_swallows_in_its_direction_alone_and_then_is_silent_for_good(
    target: Target, proxy: FaultProxy, connect: Connect, direction: str
) -> None:
    client = connect(proxy)
    service = target.accept()
    assert works(client, service)
    proxy.half_open(1.5, direction)  # type: ignore[arg-type]
    client.sendall(b"up")
    service.sendall(b"down")
    if direction == "down":
        assert receive(service, 2) == b"up"
    else:
        assert is_silent(service)
    if direction == "up":
        assert receive(client, 4) == b"down"
    else:
        assert is_silent(client)
    time.sleep(1.6)
    client.sendall(b"up")
    service.sendall(b"down")
    assert is_silent(service)
    assert is_silent(client)


def test_new_connections_work_beside_half_open_ones(
    target: Target, proxy: FaultProxy, connect: Connect
) -> None:
    old = connect(proxy)
    old_service = target.accept()
    proxy.half_open(60)
    old.sendall(b"lost")
    assert works(connect(proxy), target.accept())
    assert is_silent(old_service)


def test_new_connections_can_be_half_open_too_until_the_end(
    target: Target, proxy: FaultProxy, connect: Connect
) -> None:
    proxy.half_open(1.0, "up", new_connections=False)
    client = connect(proxy)
    service = target.accept()
    client.sendall(b"lost")
    service.sendall(b"heard")
    assert receive(client, 5) == b"heard"
    assert is_silent(service)
    time.sleep(1.0)
    service.sendall(b"no longer")
    assert is_silent(client)
    assert works(connect(proxy), target.accept())


def test_the_end_of_a_half_open_connection_is_swallowed_too(
    target: Target, proxy: FaultProxy, connect: Connect
) -> None:
    client = connect(proxy)
    service = target.accept()
    proxy.half_open(0.1, "up")
    client.close()
    assert is_silent(service)
    for _ in range(100):  # more than is kept under way: there is nobody to whom it could go
        service.sendall(b"?" * 100_000)
    assert is_silent(service)
    assert proxy.counts().open_connections == 1
    service.close()
    wait_until(lambda: proxy.counts().open_connections == 0)


# ---------------------------------------------------------------------- its own end


def test_closing_resets_what_is_open_stops_listening_and_may_be_done_twice(
    target: Target, proxy: FaultProxy, connect: Connect
) -> None:
    client = connect(proxy)
    target.accept()
    proxy.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.close()
