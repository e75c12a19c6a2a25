"""Certificates renew themselves, long before they end and whatever else the client does."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lesft.errors import LesftError
from lesft.identity.certificates import KeyPair, certificate_of, key_pem, new_key, pem, request_for
from lesft.interceptors import remote_errors
from lesft.v1 import identity_pb2, identity_pb2_grpc
from lesft_client.connector import Connector

log = logging.getLogger(__name__)

_RENEW_AT = 0.5
"""Share of its lifetime that is left when a certificate is renewed."""

_CHECKS = 20
"""Looks at a certificate in its lifetime, ..."""

_MOST_SECONDS = 600.0
"""... but at least so often."""

_SECONDS_AFTER_FAILURE = 1.0
_CALL_SECONDS = 20


@contextmanager
def renewing(connectors: Sequence[Connector]) -> Iterator[None]:
    """Keep the certificates fresh while the block runs, in a thread of their own."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=_keep_fresh, args=(connector, stop), name="renewal", daemon=True)
        for connector in connectors
        if connector.identity is not None
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()


def _keep_fresh(connector: Connector, stop: threading.Event) -> None:
    pause = 0.0
    while not stop.wait(pause):
        try:
            pause = _renew_if_due(connector)
        except (LesftError, OSError, ValueError) as error:
            log.warning("the certificate cannot be renewed, trying again: %s", error)
            pause = _SECONDS_AFTER_FAILURE


def _renew_if_due(connector: Connector) -> float:
    """Returns how many seconds later to look again. Raises LesftError, OSError or ValueError."""
    identity = connector.identity
    assert identity is not None
    if 0 < identity.lifetime_left() < _RENEW_AT:
        renew(connector)
        until = f"{identity.expires():%Y-%m-%d %H:%M}"
        log.warning(
            "the certificate for %s was renewed, good until %s UTC", connector.address, until
        )
    return min(identity.lifetime_seconds() / _CHECKS, _MOST_SECONDS)


def renew(connector: Connector) -> None:
    """Get another certificate for a new key. Raises LesftError."""
    identity = connector.identity
    assert identity is not None
    key = new_key()
    with connector.open() as channel, remote_errors(connector.address):
        response = identity_pb2_grpc.IdentityServiceStub(channel).Renew(
            identity_pb2.RenewRequest(certificate_request=request_for(key)),
            timeout=_CALL_SECONDS,
        )
    certificate = certificate_of(response.certificate, key.public_key())
    identity.replace(KeyPair(key_pem(key), pem(certificate)))
