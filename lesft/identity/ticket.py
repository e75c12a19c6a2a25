"""What people carry from one organisation to another: enrolment tokens and access tokens."""

import base64
import binascii
import zlib
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from lesft.errors import InvalidInput
from lesft.identity.settings import Service
from lesft.v1 import identity_pb2

_KINDS: dict[Service, identity_pb2.ServiceKind.ValueType] = {
    "server": identity_pb2.SERVICE_KIND_SERVER,
    "aggregator": identity_pb2.SERVICE_KIND_AGGREGATOR,
}
_SERVICES = {kind: service for service, kind in _KINDS.items()}

ENROLMENT_PREFIX = "lesft-enrol-"
ACCESS_PREFIX = "lesft-access-"


@dataclass(frozen=True)
class Ticket:
    """See identity.proto. An invitation has `address` and `client_id`, an access token neither."""

    service: Service
    control_address: str
    authority_sha256: bytes
    secret: bytes
    address: str = ""
    client_id: str = ""

    def __repr__(self) -> str:
        """Without the secret: whatever prints it may end up in a log."""
        return f"Ticket({self.service} {self.control_address} {self.client_id})"

    def text(self) -> str:
        """As people carry it."""
        message = identity_pb2.Ticket(
            service=_KINDS[self.service],
            control_address=self.control_address,
            authority_sha256=self.authority_sha256,
            secret=self.secret,
            address=self.address,
            client_id=self.client_id,
        )
        message.crc32 = zlib.crc32(message.SerializeToString(deterministic=True))
        prefix = ENROLMENT_PREFIX if self.client_id else ACCESS_PREFIX
        data = message.SerializeToString(deterministic=True)
        return prefix + base64.urlsafe_b64encode(data).decode().rstrip("=")


def read_ticket(text: str, prefix: str, what: str) -> Ticket:
    """The ticket of a text; `what` names it, such as "the enrolment token".

    Raises InvalidInput, which never quotes the text.
    """
    text = "".join(text.split())  # a terminal or a mail may have wrapped it
    if not text.startswith(prefix):
        raise InvalidInput(f"{what} begins with {prefix}, and what was given does not")
    encoded = text.removeprefix(prefix)
    message = identity_pb2.Ticket()
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        message.ParseFromString(data)
    except (binascii.Error, DecodeError, ValueError):
        raise InvalidInput(f"{what} is damaged: copy all of it, in one piece") from None
    crc32 = message.crc32
    message.ClearField("crc32")
    whole = crc32 == zlib.crc32(message.SerializeToString(deterministic=True))
    if not whole or message.service not in _SERVICES or len(message.secret) != 16:
        raise InvalidInput(f"{what} is damaged: copy all of it, in one piece")
    return Ticket(
        _SERVICES[message.service],
        message.control_address,
        message.authority_sha256,
        message.secret,
        message.address,
        message.client_id,
    )
