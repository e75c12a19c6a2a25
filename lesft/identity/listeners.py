"""The two listeners of a service: what guards them, and what it tells of them."""

from collections.abc import Callable, Mapping, Sequence

import grpc
from fastapi import FastAPI
from grpc_health.v1 import health
from starlette.types import ASGIApp

from lesft.channel import bind, check_open, is_loopback, make_server, split_address
from lesft.control import ControlServer
from lesft.identity.access import AccessControl
from lesft.identity.enrolment_api import add_enrolment_routes
from lesft.identity.security import Security
from lesft.identity.service import SERVICE_NAME, IdentityService
from lesft.identity.settings import SecuritySettings, Service
from lesft.interceptors import OnRefused
from lesft.v1.identity_pb2_grpc import add_IdentityServiceServicer_to_server


def grpc_server(
    names: Sequence[str],
    security: Security | None,
    on_refused: OnRefused,
    more: Sequence[grpc.aio.ServerInterceptor] = (),
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """As `make_server`; with security calls are let in by certificate, and these can be renewed."""
    if security is None:
        return make_server(names, more, on_refused)
    server, health_servicer = make_server(
        [*names, SERVICE_NAME], [*more, security.guard], on_refused
    )
    add_IdentityServiceServicer_to_server(IdentityService(security), server)
    return server, health_servicer


def bind_grpc(
    server: grpc.aio.Server, settings: SecuritySettings, security: Security | None
) -> str:
    """Bind to --listen; returns the real address. Raises InvalidInput or Unreachable."""
    if security is None:
        check_open(settings.listen, settings.insecure)
        return bind(server, settings.listen)
    return bind(server, settings.listen, security.grpc_credentials())


def control_server(
    app: FastAPI,
    settings: SecuritySettings,
    security: Security | None,
    counted: Callable[[ASGIApp], ASGIApp],
) -> ControlServer:
    """The control API: behind TLS and tokens, with enrolment, or plain.

    `counted` goes around all of it, to count what was refused.
    """
    if security is None:
        names = (settings.public_host, split_address(settings.control)[0])
        guarded = AccessControl(app, None, is_loopback(settings.control), names=names)
        return ControlServer(counted(guarded), settings.insecure)
    add_enrolment_routes(app, security)
    guarded = AccessControl(app, security.find_token, loopback=False)
    return ControlServer(counted(guarded), settings.insecure, security.http_context())


def endpoints_of(
    service: Service,
    settings: SecuritySettings,
    security: Security | None,
    grpc_address: str,
    control: str,
) -> Mapping[str, str]:
    """What a service leaves in endpoints.json for its own commands."""
    own = security is not None and security.authority is not None
    return {
        "service": service,
        "grpc": grpc_address,
        "control": control,
        "tls": "off" if security is None else "own" if own else "site",
        "public_host": settings.public_host,
    }
