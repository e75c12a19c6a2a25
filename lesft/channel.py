"""gRPC channels and servers: limits and keepalive that agree on both ends, health, reflection."""

import ipaddress
import re
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lesft.errors import InvalidInput, Unreachable
from lesft.interceptors import ErrorInterceptor, OnRefused

MAX_MESSAGE_BYTES = 2 << 20
"""One chunk and its envelope, with room to spare; anything larger is cut into chunks."""

KEEPALIVE_SECONDS = 30
"""Both ends ping an idle connection this often, and each lets the other do so."""

MAX_CONCURRENT_CALLS = 100
"""Calls that one connection may have under way: it waits with more, which bounds their memory."""

_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_OPTIONS = [
    *_OPTIONS,
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_CALLS),
    # Half of the other end's interval: a ping that comes a little early is no offence.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 15_000),
]
_CLIENT_OPTIONS = [
    *_OPTIONS,
    # A channel that is opened because another one fell silent must not share its connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
]

_ADDRESS = re.compile(r"(?P<host>[^\s:\[\]]+|\[[^\s\[\]]+\]):(?P<port>[0-9]{1,5})")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPV6]:PORT`. Raises InvalidInput for anything else."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise InvalidInput(
            "an address must be HOST:PORT with a port up to 65535 and brackets around an IPv6 "
            f"host, got {address!r}"
        )
    return match["host"].strip("[]"), int(match["port"])


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine alone. Raises InvalidInput."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_any(host: str) -> bool:
    """Whether a host stands for every address of this machine."""
    return host in ("0.0.0.0", "::")


def check_open(address: str, insecure: bool) -> None:
    """Refuse an address off this machine unless that was asked for by name.

    For what speaks no TLS. Raises InvalidInput.
    """
    if not is_loopback(address) and not insecure:
        raise InvalidInput(
            f"{address} is not a loopback address and traffic is not encrypted: use 127.0.0.1, "
            "or accept that anyone on the way can read and change it with --insecure"
        )


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None = None, server_name: str = ""
) -> grpc.Channel:
    """A channel to a service; connects when first used. Without credentials it is not encrypted.

    `server_name` is the name in the service's certificate where that is not the address's host.
    """
    options = _client_options(server_name)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def open_aio_channel(
    address: str, credentials: grpc.ChannelCredentials | None = None, server_name: str = ""
) -> grpc.aio.Channel:
    """As `open_channel`, for the running event loop."""
    options = _client_options(server_name)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _client_options(server_name: str) -> list[tuple[str, str | int]]:
    name = [("grpc.ssl_target_name_override", server_name)] if server_name else []
    return [*_CLIENT_OPTIONS, *name]


def make_server(
    service_names: Sequence[str],
    more: Sequence[grpc.aio.ServerInterceptor] = (),
    on_refused: OnRefused = lambda method, error: None,
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """A server with our error statuses, and the standard health and reflection services.

    `service_names` are the full names of the services that the caller will add. Health knows none
    of them until `set_serving`. `more` are interceptors whose errors become statuses, too;
    `on_refused` hears of every call that ends with an error.
    """
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(on_refused), *more], options=_SERVER_OPTIONS
    )
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server, health_servicer


async def set_serving(
    health_servicer: health.aio.HealthServicer, service_names: Sequence[str]
) -> None:
    """Say SERVING for the services and for the whole server."""
    for name in ("", *service_names):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)


def bind(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None
) -> str:
    """Bind the server and return the address it really has (port 0 takes a free one).

    Without credentials connections are not encrypted: see `check_open`.
    """
    host, _ = split_address(address)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise Unreachable(f"cannot listen on {address}: the port is taken or the host unknown")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
