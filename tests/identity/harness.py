"""Services that encrypt, the operator's commands on them, and devices that enrol."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc

from lesft.control import ENDPOINTS_FILE
from lesft.identity.authority import Authority
from lesft.identity.certificates import KeyPair, key_pem, new_key, pem, request_for
from lesft.identity.commands import enroll, revoke, token
from lesft.identity.https import ControlClient
from lesft.identity.registry import Role
from lesft.identity.ticket import ENROLMENT_PREFIX, Ticket, read_ticket
from lesft_aggregator import command_settings as of_aggregator
from lesft_aggregator.server import Aggregator
from lesft_aggregator.settings import AggregatorSettings
from lesft_client.connection_settings import ConnectionSettings
from lesft_client.connector import Connector
from lesft_client.enrol import enrol_with
from lesft_client.identities import Identities, Identity
from tests.client.harness import aggregator_of


@dataclass
class RunningAggregator:
    """An aggregator with TLS on both listeners, and its state folder."""

    aggregator: Aggregator
    state: Path

    @property
    def endpoints(self) -> dict[str, str]:
        return dict(json.loads((self.state / ENDPOINTS_FILE).read_text()))

    @property
    def grpc(self) -> str:
        return self.endpoints["grpc"]

    @property
    def control(self) -> str:
        return self.endpoints["control"]

    @property
    def authority(self) -> Authority:
        return Authority(self.state / "identity", "aggregator")

    def invite(self, client_id: str = "a", hours: float = 1) -> Ticket:
        """What the operator's command prints."""
        text = enroll(of_aggregator.EnrollSettings(client=client_id, state=self.state, hours=hours))
        assert text is not None
        return read_ticket(text, ENROLMENT_PREFIX, "the enrolment token")

    def revoke(self, client_id: str) -> None:
        revoke(of_aggregator.RevokeSettings(client=client_id, state=self.state))

    def token(self, name: str, role: Role) -> str:
        settings = of_aggregator.TokenSettings(name=name, role=role, state=self.state)
        text = token(settings)
        assert text is not None
        return text

    def rest(self, bearer: str = "") -> ControlClient:
        """The control API over TLS."""
        return ControlClient(
            self.control, self.authority.certificate_pem, "lesft-aggregator", bearer
        )

    def enrol(self, folder: Path, client_id: str = "a") -> Connector:
        """A device that has enrolled, and its way to connect."""
        enrol_with(self.invite(client_id), folder)
        return Connector(self.grpc, ConnectionSettings(identity=folder), "aggregator")

    def identity(self, folder: Path) -> Identity:
        found = Identities(folder).find(self.grpc)
        assert found is not None
        return found


@contextmanager
def secure_aggregator(state: Path, **options: Any) -> Iterator[RunningAggregator]:
    """On an event loop in a thread of its own, on loopback, while the block runs."""
    values: dict[str, Any] = {
        "state": state,
        "clients": 2,
        "listen": "127.0.0.1:0",
        "control": "127.0.0.1:0",
        "tls": "on",
        "heartbeat_seconds": 0.2,
    }
    settings = AggregatorSettings(**{**values, **options})
    with aggregator_of(settings) as (aggregator, _):
        yield RunningAggregator(aggregator, state)


def certified(authority: Authority, client_id: str, lifetime: timedelta) -> KeyPair:
    """A key with a certificate of an authority, made without the service's knowing."""
    key = new_key()
    certificate = authority.certify(request_for(key), client_id, lifetime)
    return KeyPair(key_pem(key), pem(certificate))


def raw_channel(address: str, authority_pem: bytes, pair: KeyPair | None) -> grpc.Channel:
    """A channel as a stranger would open it, with whatever it has."""
    credentials = grpc.ssl_channel_credentials(
        authority_pem, *((pair.key_pem, pair.certificate_pem) if pair else (None, None))
    )
    options = [("grpc.ssl_target_name_override", "lesft-aggregator")]
    return grpc.secure_channel(address, credentials, options=options)
