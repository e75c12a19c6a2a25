"""What guards this device's own HTTP listener: TLS and a token that its owner brings."""

import hmac
import socket
import ssl
from collections.abc import Callable
from datetime import timedelta

from starlette.types import ASGIApp

from lesft.channel import is_any, is_loopback, split_address
from lesft.control import ControlServer, https_context
from lesft.errors import InvalidInput
from lesft.identity.access import AccessControl, FindToken
from lesft.identity.authority import Authority
from lesft.identity.certificates import write_private
from lesft.identity.registry import AccessToken
from lesft.identity.security import IDENTITY_FOLDER
from lesft_client.connection_settings import ListenerSettings
from lesft_client.train_settings import TrainSettings


def control_server(
    app: ASGIApp, settings: TrainSettings, counted: Callable[[ASGIApp], ASGIApp]
) -> ControlServer:
    """The control API of lesft-client train, as its settings guard it.

    Beyond this machine it asks for a token, and speaks TLS: without a certificate of its owner's,
    under one of an authority that it makes for itself. `counted` goes around all of it, to count
    what was refused. Raises InvalidInput for what would be open by accident.
    """
    loopback, find_token = is_loopback(settings.control), _token_of(settings)
    own = settings.listener_certificate is None
    if own and not loopback and not settings.listener_insecure:
        tls: ssl.SSLContext | None = _own_context(settings)
    else:
        tls = listener_context(settings, settings.control)
    if not loopback and find_token is None and not settings.listener_insecure:
        raise InvalidInput(
            f"--control {settings.control} can be reached from elsewhere: give --control-token "
            "with a file whose token its users must bring, or let anybody look with "
            "--listener-insecure"
        )
    guarded = AccessControl(
        app, find_token, loopback, "its owner has it in the file of --control-token"
    )
    return ControlServer(counted(guarded), settings.listener_insecure, tls)


def _token_of(settings: TrainSettings) -> FindToken | None:
    if settings.control_token is None:
        return None
    try:
        token = settings.control_token.read_text().strip()
    except (OSError, ValueError) as error:
        raise InvalidInput(
            "--control-token, a file with a token, cannot be read: "
            f"{getattr(error, 'strerror', None) or 'it is not text'}"
        ) from None
    if not token:
        raise InvalidInput(f"--control-token {settings.control_token} is empty")
    return _the_one(token)


def _own_context(settings: TrainSettings) -> ssl.SSLContext:
    folder = settings.state / IDENTITY_FOLDER
    host = split_address(settings.control)[0]
    hosts = [socket.gethostname(), "localhost", "127.0.0.1"]
    # It serves as long as the run: nobody is there to renew it.
    pair = Authority(folder, "client").server_pair(
        hosts if is_any(host) else [host, *hosts], timedelta(days=3650)
    )
    file = folder / "listener.pem"
    write_private(file, pair.key_pem + pair.certificate_pem)
    context = https_context()
    context.load_cert_chain(file)
    return context


def _the_one(token: str) -> FindToken:
    known = AccessToken("owner", "operator", float("inf"))

    def find(text: str) -> AccessToken | None:
        return known if hmac.compare_digest(text.encode(), token.encode()) else None

    return find


def listener_context(settings: ListenerSettings, address: str) -> ssl.SSLContext | None:
    """What the listener shows, None where it speaks plain HTTP.

    Raises InvalidInput for files that cannot be used, and for plain HTTP beyond this machine.
    """
    if settings.listener_certificate is None or settings.listener_key is None:
        if not is_loopback(address) and not settings.listener_insecure:
            raise InvalidInput(
                f"{address} can be reached from elsewhere and would not be encrypted: use "
                "127.0.0.1, bring a certificate with --listener-certificate and --listener-key, or "
                "accept that anyone on the way can read everything with --listener-insecure"
            )
        return None
    context = https_context()
    try:
        context.load_cert_chain(settings.listener_certificate, settings.listener_key)
    except (OSError, ValueError) as error:
        raise InvalidInput(
            "--listener-certificate and --listener-key must be PEM files, and the key that of the "
            f"certificate: {error}"
        ) from None
    return context
