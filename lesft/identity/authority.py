"""A service's own certificate authority: made on first start, shared with nobody."""

import hashlib
import ipaddress
import secrets
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lesft.errors import InvalidInput
from lesft.identity.certificates import (
    KeyPair,
    der,
    key_pem,
    new_key,
    now,
    pem,
    private_folder,
    requested_key,
    self_signed,
    signed,
    write_private,
)

_KEY_FILE = "authority.key"
_CERTIFICATE_FILE = "authority.pem"
_YEARS = 20
SERVER_LIFETIME = timedelta(days=90)
"""Of the certificate that a service makes for itself."""


class Authority:
    """What signs the certificates of one service and of its clients.

    It is no use to anybody else: its folder is the service's own, and a certificate of another
    service's authority is a stranger's here.
    """

    def __init__(self, folder: Path, service: str) -> None:
        """Opens the authority in `folder`, or makes it. `service` is "server" or "aggregator".

        Raises InvalidInput when its files cannot be used.
        """
        self.server_name = f"lesft-{service}"
        self._key, self._certificate = _open_or_make(folder, f"LESFT {service}")

    @property
    def certificate_pem(self) -> bytes:
        """What its clients trust, PEM."""
        return pem(self._certificate)

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the certificate's DER: by this, clients know the service again."""
        return hashlib.sha256(der(self._certificate)).digest()

    def certify(self, request: bytes, client_id: str, lifetime: timedelta) -> x509.Certificate:
        """A certificate for a client's request (DER). Raises InvalidInput for one that is none."""
        return signed(
            self._certificate,
            self._key,
            requested_key(request),
            client_id,
            [x509.UniformResourceIdentifier(f"lesft:client:{client_id}")],
            for_server=False,
            expires=now() + lifetime,
        )

    def server_pair(self, hosts: Sequence[str], lifetime: timedelta = SERVER_LIFETIME) -> KeyPair:
        """A fresh key and certificate for the service itself, under its fixed name and `hosts`.

        Clients that enrolled look for the fixed name: the service may move to another address.
        Browsers look for the host.
        """
        key = new_key()
        certificate = signed(
            self._certificate,
            self._key,
            key.public_key(),
            self.server_name,
            [_general_name(host) for host in dict.fromkeys([self.server_name, *hosts])],
            for_server=True,
            expires=now() + lifetime,
        )
        return KeyPair(key_pem(key), pem(certificate))


def serial_of(certificate: x509.Certificate) -> str:
    """A certificate's serial number, in hex."""
    return f"{certificate.serial_number:x}"


def new_secret() -> bytes:
    """16 random bytes: nobody guesses them."""
    return secrets.token_bytes(16)


def _open_or_make(folder: Path, name: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    private_folder(folder)
    key_file, certificate_file = folder / _KEY_FILE, folder / _CERTIFICATE_FILE
    if not certificate_file.exists():
        key = new_key()
        certificate = self_signed(key, f"{name} authority {secrets.token_hex(4)}", _YEARS * 365)
        # The certificate comes last: without it, a crash in between makes another pair.
        write_private(key_file, key_pem(key))
        write_private(certificate_file, pem(certificate))
        return key, certificate
    try:
        loaded = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"the authority in {folder} cannot be read ({error}): bring {_KEY_FILE} and "
            f"{_CERTIFICATE_FILE} back from a copy, or delete both and enrol every client anew"
        ) from None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or (
        loaded.public_key() != certificate.public_key()
    ):
        raise InvalidInput(
            f"the authority in {folder}: {_KEY_FILE} is not the key of {_CERTIFICATE_FILE}; bring "
            "the right pair back from a copy, or delete both and enrol every client anew"
        )
    return loaded, certificate


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
