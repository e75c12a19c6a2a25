"""How one service proves who it is, and knows who calls."""

import asyncio
import contextlib
import logging
import ssl
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509

from lesft.channel import is_any, is_loopback, split_address
from lesft.control import https_context
from lesft.errors import InvalidInput, NotAuthenticated
from lesft.identity.authority import SERVER_LIFETIME, Authority
from lesft.identity.caller import Caller
from lesft.identity.certificates import (
    KeyPair,
    common_name,
    now,
    public_bytes,
    requested_key,
    write_private,
)
from lesft.identity.guard import CallGuard
from lesft.identity.registry import AccessToken, Certify, Registry
from lesft.identity.settings import SecuritySettings, Service
from lesft.identity.ticket import ACCESS_PREFIX, read_ticket

log = logging.getLogger(__name__)

IDENTITY_FOLDER = "identity"
_REGISTRY_FILE = "registry.sqlite"
_RENEWAL_CHECK_SECONDS = 3600.0
_SERVER_FILE = "server.pem"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_encrypted(settings: SecuritySettings) -> bool:
    """Whether a service with these settings speaks TLS; off loopback it does by default."""
    if settings.insecure:
        return False
    addresses = (settings.listen, settings.control)
    return settings.tls == "on" or not all(is_loopback(address) for address in addresses)


def open_registry(state: Path) -> Registry:
    """The registry in a service's state folder."""
    return Registry(state / IDENTITY_FOLDER / _REGISTRY_FILE)


def open_authority(state: Path, service: Service) -> Authority:
    """The authority in a service's state folder, made when there is none."""
    return Authority(state / IDENTITY_FOLDER, service)


@dataclass
class _Serving:
    """What both listeners show at each handshake; Python's ssl wants files."""

    pair: KeyPair
    client_authority_pem: bytes
    certificate_file: Path
    key_file: Path

    def load_into(self, context: ssl.SSLContext) -> None:
        """Show this to whoever connects from now on. Raises OSError or ValueError (ssl's too)."""
        context.load_cert_chain(self.certificate_file, self.key_file)


class Security:
    """TLS on both listeners of a service, its registry, and its authority if it has its own."""

    def __init__(self, settings: SecuritySettings, service: Service) -> None:
        """Opens or makes what the service needs in its state folder. Raises InvalidInput."""
        self._settings = settings
        self.service = service
        self.registry = open_registry(settings.state)
        self.authority: Authority | None = None
        if settings.certificate is None:
            self.authority = open_authority(settings.state, service)
            self._serving = self._own(self.authority)
        else:
            self._serving = _site_files(settings)
        self.guard = CallGuard(self.registry, own_authority=self.authority is not None)
        self._http = https_context()
        self._serving.load_into(self._http)
        self._tasks: list[asyncio.Task[None]] = []
        own = f"authority sha256:{self.authority.sha256.hex()}" if self.authority else "site's own"
        log.info(
            "connections are encrypted (%s); a device gets in with what lesft-%s enroll NAME "
            "prints, a person with what lesft-%s token NAME prints",
            own,
            service,
            service,
        )

    @classmethod
    def of(cls, settings: SecuritySettings, service: Service) -> "Security | None":
        """None where the settings mean no encryption. Raises InvalidInput."""
        return cls(settings, service) if is_encrypted(settings) else None

    @property
    def expires(self) -> datetime:
        """When the service's own certificate ends."""
        return self._serving.pair.expires

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For the gRPC listener: nobody gets past the handshake without a certificate of ours."""
        return grpc.dynamic_ssl_server_credentials(
            self._grpc_configuration(),
            self._grpc_configuration,
            require_client_authentication=True,
        )

    def http_context(self) -> ssl.SSLContext:
        """For the control API, whose users bring tokens instead of certificates."""
        return self._http

    def start(self) -> None:
        """Watch over open calls and the service's own certificate, on the running event loop."""
        self._tasks = [
            asyncio.create_task(self.guard.watch()),
            asyncio.create_task(self._renew_itself()),
        ]

    async def stop(self) -> None:
        """Stop watching; close the registry."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.registry.close()

    # ------------------------------------------------------------------ clients

    def enrol(self, secret: bytes, request: bytes) -> x509.Certificate:
        """A first certificate, for an invitation's secret and a request in DER.

        Raises NotAuthenticated for a secret that is not good, InvalidInput for a bad request or
        where certificates are a site's own.
        """
        authority = self._own_authority()
        key = public_bytes(requested_key(request))
        certificate = self.registry.enrol(secret, key, self._certifying(authority, request))
        log.info("client %s has enrolled", common_name(certificate))
        return certificate

    def renew(self, caller: Caller | None, request: bytes) -> x509.Certificate:
        """Another certificate for a client that has shown one. Raises as `enrol` does."""
        if caller is None:
            raise NotAuthenticated("connections are not encrypted here: there is nothing to renew")
        certifying = self._certifying(self._own_authority(), request)
        return self.registry.renew(caller.serial, caller.client_id, certifying)

    def _certifying(self, authority: Authority, request: bytes) -> Certify:
        lifetime = timedelta(hours=self._settings.certificate_hours)
        return lambda client_id: authority.certify(request, client_id, lifetime)

    def _own_authority(self) -> Authority:
        if self.authority is None:
            raise InvalidInput(
                "this service uses its site's own certificates: get one from whoever runs that "
                "authority"
            )
        return self.authority

    def find_token(self, text: str) -> AccessToken | None:
        """The access token that a text is, None for one that is not good here."""
        try:
            secret = read_ticket(text, ACCESS_PREFIX, "the access token").secret
        except InvalidInput as error:
            raise NotAuthenticated(str(error)) from None
        return self.registry.find_token(secret)

    # ------------------------------------------------------------------ its own certificate

    def _own(self, authority: Authority) -> _Serving:
        settings = self._settings
        hosts = [split_address(address)[0] for address in (settings.listen, settings.control)]
        named = [host for host in (settings.public_host, *hosts) if host and not is_any(host)]
        pair = authority.server_pair([*named, *_LOOPBACK_NAMES])
        file = settings.state / IDENTITY_FOLDER / _SERVER_FILE
        write_private(file, pair.key_pem + pair.certificate_pem)
        return _Serving(pair, authority.certificate_pem, file, file)

    async def _renew_itself(self) -> None:
        """Own certificates are made anew half-way; a site's are read again when they change."""
        while True:
            await asyncio.sleep(_RENEWAL_CHECK_SECONDS)
            try:
                if self.authority is None:
                    self._serve_with(_site_files(self._settings))
                elif self.expires - now() < SERVER_LIFETIME / 2:
                    self._serve_with(self._own(self.authority))
            except (OSError, InvalidInput) as error:
                log.error("the certificate cannot be renewed: %s", error)

    def _serve_with(self, serving: _Serving) -> None:
        if serving != self._serving:
            serving.load_into(self._http)
            self._serving = serving
            log.info("a new certificate is in use, good until %s", serving.pair.expires)

    def _grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        """Called by gRPC at every handshake, in a thread of its own."""
        pair = self._serving.pair
        return grpc.ssl_server_certificate_configuration(
            [(pair.key_pem, pair.certificate_pem)],
            root_certificates=self._serving.client_authority_pem,
        )


def _site_files(settings: SecuritySettings) -> _Serving:
    assert settings.certificate is not None
    assert settings.certificate_key is not None
    assert settings.client_authority is not None
    try:
        pair = KeyPair(settings.certificate_key.read_bytes(), settings.certificate.read_bytes())
        authority = settings.client_authority.read_bytes()
        x509.load_pem_x509_certificates(authority)
        serving = _Serving(pair, authority, settings.certificate, settings.certificate_key)
        serving.load_into(https_context())
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"--certificate, --certificate-key and --client-authority must be PEM files, and the "
            f"key that of the certificate: {error}"
        ) from None
    return serving
