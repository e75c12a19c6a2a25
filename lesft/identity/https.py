"""Asking a control API over HTTPS (RFC 9110), certain of who answers, or over plain loopback."""

import copy
import hashlib
import http.client
import json
import socket
import ssl
from typing import Any

from cryptography import x509

from lesft.channel import check_open, split_address
from lesft.errors import NotAuthenticated, Unreachable, error_for_http, one_line
from lesft.identity.certificates import der, pem

_TIMEOUT_SECONDS = 20
_MAX_ANSWER_BYTES = 16 << 20

_Answer = tuple[int, bytes]
"""HTTP status and body."""


def fetch_authority(address: str, sha256: bytes) -> bytes:
    """The certificate (PEM) of the authority that `sha256` is of, from the service itself.

    It comes over a connection that proves nothing; the digest does. Raises NotAuthenticated when
    the service has another authority, Unreachable when it does not answer.
    """
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    came = _checked(address, _exchange(address, unverified, None, "GET", "/v1/authority", None, {}))
    try:
        certificate = x509.load_pem_x509_certificate(came)
    except ValueError:
        certificate = None
    if certificate is None or hashlib.sha256(der(certificate)).digest() != sha256:
        raise NotAuthenticated(
            f"{address} is not the service that the token is of: its authority is another one. The "
            "address may be wrong, the service may have lost its state folder, or someone on the "
            "way pretends to be it; ask the operator for a new token"
        )
    return pem(certificate)  # and no other that may have come with it


class ControlClient:
    """One control API, with its answers as JSON."""

    def __init__(
        self, address: str, authority_pem: bytes | None, server_name: str = "", bearer: str = ""
    ) -> None:
        """`authority_pem` signs the service's certificate, and `server_name` is in it.

        Without an authority the service is a plain one on this machine, or, where a `server_name`
        is given, one whose certificate this machine trusts as it trusts any. Raises InvalidInput
        for plain HTTP beyond this machine.
        """
        self._address = address
        self._server_name = server_name
        self._headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        self._context: ssl.SSLContext | None = None
        if authority_pem is not None:
            self._context = ssl.create_default_context(cadata=authority_pem.decode())
        elif server_name:
            self._context = ssl.create_default_context()
        else:
            check_open(address, insecure=False)

    def as_stranger(self) -> "ControlClient":
        """The same without a token."""
        other = copy.copy(self)
        other._headers = {}
        return other

    def get(self, path: str) -> Any:
        """Raises the error that the service answers with, or Unreachable."""
        return self._json("GET", path, None)

    def file(self, path: str) -> bytes:
        """An answer that is no JSON; raises as `get`."""
        return _checked(self._address, self._ask("GET", path, None))

    def post(self, path: str, body: Any) -> Any:
        """As `get`."""
        return self._json("POST", path, body)

    def obstacle(self) -> str:
        """Why the service cannot do its work at the moment, by /readyz; empty when it can."""
        status, answer = self._ask("GET", "/readyz", None)
        if status != 503:
            _checked(self._address, (status, answer))
            return ""
        return one_line(answer.decode(errors="replace"))

    def _ask(self, method: str, path: str, body: bytes | None) -> _Answer:
        return _exchange(
            self._address, self._context, self._server_name, method, path, body, self._headers
        )

    def _json(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        answer = _checked(self._address, self._ask(method, path, data))
        try:
            return json.loads(answer)
        except ValueError:
            raise Unreachable(f"{self._address}: did not answer as a LESFT service does") from None


class _Connection(http.client.HTTPConnection):
    """TLS to an address under a name that need not be the address's host."""

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext | None, server_name: str | None
    ) -> None:
        super().__init__(host, port, timeout=_TIMEOUT_SECONDS)
        self._context = context
        self._server_name = server_name or host

    def connect(self) -> None:
        """See http.client."""
        super().connect()
        if self._context is not None:
            self.sock: socket.socket = self._context.wrap_socket(
                self.sock, server_hostname=self._server_name
            )


def _exchange(
    address: str,
    context: ssl.SSLContext | None,
    server_name: str | None,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
) -> _Answer:
    host, port = split_address(address)
    connection = _Connection(host, port, context, server_name)
    if body is not None:
        headers = {**headers, "Content-Type": "application/json"}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.read(_MAX_ANSWER_BYTES)
    except ssl.SSLCertVerificationError as error:
        raise NotAuthenticated(
            f"{address}: its certificate is not of the authority that was expected "
            f"({error.verify_message}): another service, or someone on the way"
        ) from None
    except ssl.SSLError as error:
        raise Unreachable(f"{address}: speaks no TLS ({error.reason}); check the address") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if context is None and isinstance(error, http.client.HTTPException | ConnectionError):
            reason = f"{reason} (a service that encrypts wants a token: --token)"
        raise Unreachable(f"{address}: {reason}; is it running and is the address right?") from None
    finally:
        connection.close()
    return response.status, answer


def _checked(address: str, answered: _Answer) -> bytes:
    """The answer. Raises the error that it stands for."""
    status, answer = answered
    if status < 400:
        return answer
    try:
        body = json.loads(answer)
        name, message = str(body["error"]), one_line(str(body["message"]))
    except (ValueError, TypeError, KeyError):
        name, message = "", f"answered with HTTP status {status}"
    raise error_for_http(name, status)(f"{address}: {message}")
