"""Channels to a service: encrypted, under this device's certificate, where it has enrolled."""

import socket
import ssl
from collections.abc import Sequence

import grpc
from cryptography import x509

from lesft.channel import check_open, is_loopback, open_aio_channel, open_channel, split_address
from lesft.errors import InvalidInput, NotAuthenticated
from lesft.identity.certificates import common_name
from lesft.identity.settings import Service
from lesft_client.connection_settings import ConnectionSettings
from lesft_client.identities import Identities, Identity

_PROBE_SECONDS = 5


class Connector:
    """Opens channels to one service, as often as is needed."""

    def __init__(self, address: str, settings: ConnectionSettings, service: Service) -> None:
        """Raises InvalidInput for an address beyond this machine that it has not enrolled with.

        `service` is what it must have enrolled with there.
        """
        self.address = address
        self.identity: Identity | None = None
        self._site: _SiteCertificates | None = None
        self._proven = False
        if settings.certificate is not None:
            self._site = _SiteCertificates(settings)
        elif not settings.insecure:
            identities = Identities(settings.identity)
            self.identity = identities.find(address)
            if self.identity is None and not is_loopback(address):
                known = ", ".join(identities.known()) or "none"
                raise InvalidInput(
                    f"this device has not enrolled with {address} (but with: {known}): ask its "
                    "operator for an enrolment token and run lesft-client enroll TOKEN, or accept "
                    "that anyone on the way can read and change everything with --insecure"
                )
            if self.identity is not None and self.identity.facts.service != service:
                raise InvalidInput(
                    f"{address} is an {self.identity.facts.service} that this device has enrolled "
                    f"with, and no {service}: check the address"
                )
        check_open(address, settings.insecure or self.encrypted)

    @property
    def encrypted(self) -> bool:
        """Whether its channels speak TLS."""
        return self.identity is not None or self._site is not None

    @property
    def client_id(self) -> str:
        """Who this device is to the service, by its certificate; empty where it shows none."""
        if self._site is not None:
            return self._site.client_id
        return self.identity.facts.client_id if self.identity else ""

    def open(self) -> grpc.Channel:
        """A channel; connects when first used.

        Raises NotAuthenticated when the service and this device do not accept each other: gRPC
        itself would only say that the connection was closed.
        """
        credentials = self._credentials()
        if not self._proven:  # once: later it is this service, and a probe costs round trips
            self._proven = _prove(self)
        return open_channel(self.address, credentials, self._server_name)

    def open_aio(self) -> grpc.aio.Channel:
        """As `open`, for the running event loop, and without its proof."""
        return open_aio_channel(self.address, self._credentials(), self._server_name)

    @property
    def _server_name(self) -> str:
        return self.identity.facts.server_name if self.identity else ""

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self._site is not None:
            return self._site.credentials()
        if self.identity is None:
            return None
        self.identity.check_not_expired()
        return self.identity.credentials()

    def tls_context(self) -> ssl.SSLContext:
        """What a handshake of this device's looks like to Python's ssl."""
        if self._site is not None:
            return self._site.tls_context()
        assert self.identity is not None
        context = ssl.create_default_context(cadata=self.identity.authority_pem.decode())
        context.load_cert_chain(self.identity.pair_file)
        return context

    @property
    def expected_name(self) -> str:
        """The name that must be in the service's certificate."""
        return self._server_name or split_address(self.address)[0]


class _SiteCertificates:
    """A certificate that the device's site has given it, in place of an enrolment."""

    def __init__(self, settings: ConnectionSettings) -> None:
        assert settings.certificate is not None
        assert settings.certificate_key is not None
        assert settings.authority is not None
        self._files = (settings.authority, settings.certificate_key, settings.certificate)
        try:
            pem = settings.certificate.read_bytes()
            self.client_id = common_name(x509.load_pem_x509_certificate(pem))
            self.tls_context()
        except (OSError, ValueError) as error:
            raise InvalidInput(
                "--certificate, --certificate-key and --authority must be PEM files, and the key "
                f"that of the certificate: {error}"
            ) from None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read anew each time: the site may have renewed them."""
        return grpc.ssl_channel_credentials(*(file.read_bytes() for file in self._files))

    def tls_context(self) -> ssl.SSLContext:
        """The same for Python's ssl."""
        authority, key, certificate = self._files
        context = ssl.create_default_context(cafile=str(authority))
        context.load_cert_chain(certificate, key)
        return context


def _prove(connector: Connector) -> bool:
    """Raises NotAuthenticated where connecting will fail, with the reason.

    False when the service does not answer at all, which is left to gRPC, which tries again.
    """
    host, port = split_address(connector.address)
    address = connector.address
    try:
        with socket.create_connection((host, port), _PROBE_SECONDS) as raw:
            if connector.encrypted:
                _prove_encrypted(connector, raw)
            elif _speaks_tls(raw):
                raise NotAuthenticated(
                    f"{address} lets in only devices that have enrolled: ask its operator for an "
                    "enrolment token and run lesft-client enroll TOKEN"
                )
    except OSError:
        return False
    return True


def _prove_encrypted(connector: Connector, raw: socket.socket) -> None:
    context, address = connector.tls_context(), connector.address
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(raw, server_hostname=connector.expected_name) as tls:
            accepted = _says_something(tls)
    except ssl.SSLCertVerificationError as error:
        raise NotAuthenticated(
            f"{address} is not the service that this device has enrolled with "
            f"({error.verify_message}): the address may be wrong, the service may have lost its "
            "state folder, or someone on the way pretends to be it; ask its operator"
        ) from None
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            raise NotAuthenticated(
                f"{address} does not encrypt, and this device has enrolled with a service there "
                "that did: ask its operator; --insecure would trust whoever answers"
            ) from None
        raise ConnectionError from None  # whoever answers may not be the service yet
    if not accepted:
        raise NotAuthenticated(
            f"{address} does not accept this device's certificate: it may be of another "
            "authority, as after the service has lost its state folder; ask the operator for a new "
            "enrolment token and run lesft-client enroll"
        )


def _says_something(tls: ssl.SSLSocket) -> bool:
    """Whether the first byte of HTTP/2's settings comes: the client's certificate was taken."""
    try:
        return bool(tls.recv(1))
    except (ssl.SSLError, ConnectionError):
        return False


def _speaks_tls(raw: socket.socket) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(raw):
            return True
    except (ssl.SSLError, OSError):
        return False


def own_client_id(given: str, connectors: Sequence[Connector]) -> str:
    """The name of this client: that of its certificates, what was given, or the host's.

    Raises InvalidInput where these are not the same.
    """
    names = {c.address: c.client_id for c in connectors if c.client_id}
    for address, name in names.items():
        if given and given != name:
            raise InvalidInput(
                f"--client-id {given}: this device's certificate for {address} is of {name!r}, and "
                "that is the name that counts: leave --client-id out, or enrol under the other name"
            )
    if len(set(names.values())) > 1:
        both = ", ".join(f"{name!r} at {address}" for address, name in names.items())
        raise InvalidInput(
            f"this device has enrolled under two names, {both}: a client has one name in a run; "
            "ask for an enrolment token of the other name at one of them"
        )
    return next(iter(names.values()), given or socket.gethostname())
