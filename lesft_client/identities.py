"""What this device has enrolled with: one key and certificate a service, in one folder each."""

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from lesft.errors import InvalidInput
from lesft.files import write_atomically
from lesft.identity.certificates import (
    BACKDATED,
    KeyPair,
    der,
    key_pem,
    new_key,
    now,
    pem,
    private_folder,
    private_key,
    write_private,
)
from lesft.identity.settings import Service

_FACTS_FILE = "identity.json"
_AUTHORITY_FILE = "authority.pem"
_PAIR_FILE = "client.pem"
_PENDING = "pending-"


@dataclass(frozen=True)
class Facts:
    """Who this device is to one service."""

    service: Service
    address: str
    """HOST:PORT of its gRPC services."""
    server_name: str
    """The name in its certificate."""
    client_id: str
    token_sha256: str = ""
    """Digest of the secret that it enrolled with."""


def digest_of(secret: bytes) -> str:
    """By which a token is known again without being kept."""
    return hashlib.sha256(secret).hexdigest()


class Identity:
    """This device's key and certificate at one service. The key never leaves its folder."""

    def __init__(self, folder: Path) -> None:
        """Raises InvalidInput when something of it is missing or damaged."""
        self._folder = folder
        try:
            self.facts = Facts(**json.loads((folder / _FACTS_FILE).read_text()))
            self._authority = x509.load_pem_x509_certificate(
                (folder / _AUTHORITY_FILE).read_bytes()
            )
            self._pair()
        except (OSError, ValueError, TypeError) as error:
            raise InvalidInput(
                f"the identity in {folder} cannot be read ({error}): delete that folder and enrol "
                "again"
            ) from None

    def expires(self) -> datetime:
        """When its newest certificate ends, in UTC."""
        return self._pair().expires

    def lifetime_seconds(self) -> float:
        """From its newest certificate's beginning to its end."""
        ends, begins = self._times()
        return (ends - begins).total_seconds()

    def lifetime_left(self) -> float:
        """The share of that which is left: 1 when it is new, 0 or less when it has ended."""
        ends, begins = self._times()
        return (ends - now()) / (ends - begins)

    def _times(self) -> tuple[datetime, datetime]:
        certificate = x509.load_pem_x509_certificate(self._pair().certificate_pem)
        return certificate.not_valid_after_utc, certificate.not_valid_before_utc + BACKDATED

    @property
    def authority_pem(self) -> bytes:
        """The one certificate that the service's own must be signed with."""
        return pem(self._authority)

    @property
    def authority_sha256(self) -> bytes:
        """By which the service is known again; as in its tokens."""
        return hashlib.sha256(der(self._authority)).digest()

    @property
    def pair_file(self) -> Path:
        """Key and certificate, PEM, for what reads files only."""
        return self._folder / _PAIR_FILE

    def credentials(self) -> grpc.ChannelCredentials:
        """As they are now: another process may have renewed them."""
        pair = self._pair()
        return grpc.ssl_channel_credentials(self.authority_pem, pair.key_pem, pair.certificate_pem)

    def replace(self, pair: KeyPair) -> None:
        """Use another key and certificate from now on."""
        _write_pair(self._folder, pair)

    def check_not_expired(self) -> None:
        """Raises InvalidInput when the certificate has ended, so that nothing can renew it."""
        expires = self.expires()
        if expires <= now():
            raise InvalidInput(
                f"this device's certificate for {self.facts.address} ended on "
                f"{expires:%Y-%m-%d %H:%M} UTC, since it was not in use for too long: ask the "
                "operator for a new enrolment token, and run lesft-client enroll"
            )

    def _pair(self) -> KeyPair:
        both = self.pair_file.read_bytes()
        begin = both.index(b"-----BEGIN CERTIFICATE")
        return KeyPair(both[:begin], both[begin:])


class Identities:
    """All of this device's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, address: str) -> Identity | None:
        """The identity for the service at HOST:PORT, None where there is none."""
        folder = self._folder / _folder_name(address)
        # The facts are written last: without them, enrolling was cut off.
        identity = Identity(folder) if (folder / _FACTS_FILE).exists() else None
        return identity if identity is not None and identity.facts.address == address else None

    def known(self) -> list[str]:
        """The addresses of all of them."""
        folders = sorted(self._folder.glob(f"*/{_FACTS_FILE}"))
        return [json.loads(file.read_text())["address"] for file in folders]

    def key_for(self, secret: bytes) -> ec.EllipticCurvePrivateKey:
        """The key to enrol with for a token: a new one, or that of an earlier try."""
        private_folder(self._folder)
        file = self._pending(digest_of(secret))
        if file.exists():
            return private_key(file.read_bytes())
        key = new_key()
        write_private(file, key_pem(key))
        return key

    def add(self, facts: Facts, authority_pem: bytes, pair: KeyPair) -> Path:
        """Keep a new one in place of what there was for that address; returns its folder."""
        private_folder(self._folder)
        folder = self._folder / _folder_name(facts.address)
        private_folder(folder)
        _write_pair(folder, pair)
        write_atomically(folder / _AUTHORITY_FILE, authority_pem)
        write_atomically(folder / _FACTS_FILE, json.dumps(asdict(facts), indent=2).encode())
        self._pending(facts.token_sha256).unlink(missing_ok=True)
        return folder

    def _pending(self, token_sha256: str) -> Path:
        return self._folder / f"{_PENDING}{token_sha256[:16]}.key"


def _write_pair(folder: Path, pair: KeyPair) -> None:
    # One file: key and certificate change together or not at all.
    write_private(folder / _PAIR_FILE, pair.key_pem + pair.certificate_pem)


def _folder_name(address: str) -> str:
    return "".join(char if char.isalnum() or char in ".-" else "_" for char in address)
