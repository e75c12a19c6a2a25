"""Addresses, limits and keepalive of our channels and servers."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lesft import channel
from lesft.channel import (
    KEEPALIVE_SECONDS,
    MAX_CONCURRENT_CALLS,
    MAX_MESSAGE_BYTES,
    bind,
    check_open,
    is_loopback,
    make_server,
    open_channel,
    split_address,
)
from lesft.errors import InvalidInput, LesftError, Unreachable
from lesft.interceptors import remote_errors
from tests.harness import running_server, server_settings
from tests.server.harness import assert_serving

# ---------------------------------------------------------------------- addresses

GOOD = {
    "127.0.0.1:50051": ("127.0.0.1", 50051),
    "127.255.0.9:0": ("127.255.0.9", 0),
    "localhost:65535": ("localhost", 65535),
    "[::1]:50051": ("::1", 50051),
    "example.org:80": ("example.org", 80),
}
MALFORMED = [
    *("", ":", "localhost", "127.0.0.1", ":50051", "50051", "localhost:", "localhost:port"),
    *("localhost:-1", "localhost:65536", "localhost:100000", "localhost:1e3", "localhost: 1"),
    *("localhost:1 ", "local host:1", "localhost:1\n", "\u00b2:\u00b2", "localhost:\u00b2"),
    *("localhost:\u0661", "::1:50051", "[::1:50051", "::1]:50051", "[]:1", "[::1]", "[::1]50051"),
    *("http://localhost:1", "unix:/tmp/socket", "dns:localhost:1", "ipv4:127.0.0.1:1"),
]
OPEN = ["0.0.0.0:1", "[::]:1", "10.0.0.5:1", "192.168.1.7:1", "example.org:1", "localhost.evil:1"]
OPEN += ["127.0.0.1.evil.org:1", "127.1:1", "[::ffff:10.0.0.5]:1", "2130706433:1"]


@pytest.mark.parametrize("address", GOOD)
def test_an_address_is_split_into_host_and_port(address: str) -> None:
    assert split_address(address) == GOOD[address]


@pytest.mark.parametrize("address", MALFORMED)
@pytest.mark.parametrize("insecure", [False, True])
def test_a_malformed_address_is_refused_by_name(address: str, insecure: bool) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_open(address, insecure)
    assert str(caught.value) == (
        "an address must be HOST:PORT with a port up to 65535 and brackets around an IPv6 host, "
        f"got {address!r}"
    )


def open_message(address: str) -> str:
    return (
        f"{address} is not a loopback address and traffic is not encrypted: use 127.0.0.1, or "
        "accept that anyone on the way can read and change it with --insecure"
    )


@pytest.mark.parametrize("address", OPEN)
def test_an_address_beyond_this_machine_needs_insecure(address: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_open(address, insecure=False)
    assert str(caught.value) == open_message(address)
    check_open(address, insecure=True)
    assert not is_loopback(address)


@pytest.mark.parametrize("address", [a for a in GOOD if a != "example.org:80"])
def test_loopback_addresses_need_nothing(address: str) -> None:
    check_open(address, insecure=False)
    assert is_loopback(address)


@pytest.mark.parametrize("option", ["listen", "control"])
def test_a_server_that_listens_beyond_this_machine_encrypts_unasked(
    option: str, model: Path, tmp_path: Path
) -> None:
    settings = server_settings(model, tmp_path / "state", **{option: "0.0.0.0:0"})
    with running_server(settings) as server:
        port = split_address(server.grpc)[1]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
            health = health_pb2_grpc.HealthStub(opened)
            with pytest.raises(grpc.RpcError) as caught:
                health.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_server_listens_beyond_this_machine_when_asked_by_name(
    model: Path, tmp_path: Path
) -> None:
    settings = server_settings(model, tmp_path, listen="0.0.0.0:0", insecure=True)
    with running_server(settings) as server:
        host, port = split_address(server.grpc)
        assert host == "0.0.0.0"
        with grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
            answer = health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


TAKEN = {
    "listen": "cannot listen on {}: the port is taken or the host unknown",
    "control": (
        "cannot listen on {}: Address already in use; choose another address, or port 0 for any "
        "free one"
    ),
}


@pytest.mark.parametrize("option", TAKEN)
def test_a_port_that_is_taken_is_named(
    option: str, taken: str, model: Path, tmp_path: Path
) -> None:
    settings = server_settings(model, tmp_path, **{option: taken})
    with pytest.raises(Unreachable) as caught, running_server(settings):
        pass
    assert str(caught.value) == TAKEN[option].format(taken)
    assert not (tmp_path / "endpoints.json").exists()


def test_two_servers_cannot_share_a_port(model: Path, tmp_path: Path) -> None:
    with running_server(server_settings(model, tmp_path / "one")) as first:
        settings = server_settings(model, tmp_path / "two", listen=first.grpc)
        with pytest.raises(Unreachable, match="the port is taken"), running_server(settings):
            pass
        assert_serving(first)


def test_the_real_address_of_an_ipv6_host_has_its_brackets() -> None:
    class Listening:  # not every machine has IPv6
        def add_insecure_port(self, address: str) -> int:
            assert address == "[::1]:0"
            return 1234

    server: Any = Listening()
    assert bind(server, "[::1]:0") == "[::1]:1234"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_port_0_takes_a_free_one_and_the_real_address_can_be_called(host: str) -> None:
    async def run() -> None:
        server, _ = make_server([])
        try:
            address = bind(server, f"{host}:0")
            assert address.startswith(f"{host}:")
            assert split_address(address)[1] > 0
            await server.start()
            async with grpc.aio.insecure_channel(address) as opened:
                stub: Any = health_pb2_grpc.HealthStub(opened)
                answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        finally:
            await server.stop(0)

    asyncio.run(run())


def test_a_service_that_is_not_there_is_unreachable_and_named() -> None:
    address = "127.0.0.1:1"
    with (
        open_channel(address) as opened,
        pytest.raises(LesftError) as caught,
        remote_errors(f"server {address}"),
    ):
        health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert type(caught.value) is Unreachable
    assert str(caught.value).startswith(f"server {address}: failed to connect to all addresses")


# ---------------------------------------------------------------------- limits and keepalive


def test_both_ends_keep_to_the_same_message_limit_which_holds_a_chunk() -> None:
    for options in (dict(channel._CLIENT_OPTIONS), dict(channel._SERVER_OPTIONS)):
        assert options["grpc.max_send_message_length"] == MAX_MESSAGE_BYTES
        assert options["grpc.max_receive_message_length"] == MAX_MESSAGE_BYTES
    assert MAX_MESSAGE_BYTES > 1.5 * 2**20


def test_the_server_allows_the_pings_that_the_client_sends() -> None:
    client, server = dict(channel._CLIENT_OPTIONS), dict(channel._SERVER_OPTIONS)
    ping_ms = client["grpc.keepalive_time_ms"]
    assert ping_ms == KEEPALIVE_SECONDS * 1000
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < ping_ms
    assert server["grpc.keepalive_permit_without_calls"] == 1
    assert client["grpc.keepalive_permit_without_calls"] == 1
    assert client["grpc.http2.max_pings_without_data"] == 0


def faster(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The same settings with all intervals of keepalive a hundredth."""
    intervals = ("grpc.keepalive_time_ms", "grpc.http2.min_ping_interval_without_data_ms")
    return [(name, value // 100 if name in intervals else value) for name, value in options]


@asynccontextmanager
async def watched(options: list[tuple[str, int]]) -> AsyncIterator[Any]:
    """A call that stays idle on a connection between a server with `options` and our client."""
    server = grpc.aio.server(options=options)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client_options = faster(channel._CLIENT_OPTIONS)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", client_options) as opened:
            stub: Any = health_pb2_grpc.HealthStub(opened)
            call = stub.Watch(health_pb2.HealthCheckRequest())
            await call.read()
            yield call
    finally:
        await server.stop(0)


def test_an_idle_connection_outlives_the_pings_that_a_stricter_server_punishes() -> None:
    """With time a hundredfold: the stricter server's end tells that enough pings were sent."""
    strict = [
        (name, 10 * value if name == "grpc.http2.min_ping_interval_without_data_ms" else value)
        for name, value in channel._SERVER_OPTIONS
    ]

    async def run() -> None:
        async with watched(faster(channel._SERVER_OPTIONS)) as ours:
            async with watched(faster(strict)) as punished:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await punished.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert caught.value.details() == "Too many pings"
            assert not ours.done()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_one_connection_cannot_open_calls_without_end(model: Path, tmp_path: Path) -> None:
    request = health_pb2.HealthCheckRequest()
    with (
        running_server(server_settings(model, tmp_path)) as server,
        open_channel(server.grpc) as greedy,
        open_channel(server.grpc) as other,
    ):
        stub = health_pb2_grpc.HealthStub(greedy)
        calls = [stub.Watch(request) for _ in range(MAX_CONCURRENT_CALLS)]
        for call in calls:
            next(call)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(request, timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # Every channel of ours has a connection of its own.
        answer = health_pb2_grpc.HealthStub(other).Check(request, timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        calls.pop().cancel()
        assert stub.Check(request, timeout=20).status == health_pb2.HealthCheckResponse.SERVING
        for call in calls:
            call.cancel()
