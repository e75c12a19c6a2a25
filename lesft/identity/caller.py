"""Who calls: the name in the client's certificate, never what a message or an address says."""

import functools
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc
from cryptography import x509

from lesft.errors import NotAllowed, NotAuthenticated
from lesft.identity.authority import serial_of
from lesft.identity.certificates import common_name
from lesft.spec import CLIENT_ID

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Caller:
    """What the certificate of a call says."""

    client_id: str
    serial: str
    expires: datetime


def caller_of(context: Context) -> Caller | None:
    """Who calls; None where connections are not encrypted, and nobody has shown who they are.

    The TLS library has verified the certificate. Raises NotAuthenticated for a name that no client
    can have.
    """
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    return None if pem is None else _read(pem)


@functools.lru_cache(maxsize=1024)  # guard, limits and handler ask, at each call
def _read(pem: bytes) -> Caller:
    certificate = x509.load_pem_x509_certificate(pem)
    client_id = common_name(certificate)
    if not CLIENT_ID.fullmatch(client_id):
        raise NotAuthenticated(
            "the certificate's common name is the client's id and must be 1 to 64 letters, digits, "
            f"'.', '_' or '-', got {client_id[:80]!r}"
        )
    return Caller(client_id, serial_of(certificate), certificate.not_valid_after_utc)


def check_acts_for_itself(context: Context, client_id: str) -> None:
    """Raises NotAllowed when a call is made in another client's name."""
    caller = caller_of(context)
    if caller is not None and caller.client_id != client_id:
        raise NotAllowed(
            f"client_id: the certificate says {caller.client_id!r}, the message "
            f"{client_id[:80]!r}; a client acts for itself only"
        )
