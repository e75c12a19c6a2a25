"""Who may use a control API: bearer tokens (RFC 6750), roles, and what any caller is held to."""

import ipaddress
import logging
from collections.abc import Callable, Collection
from typing import Any

from fastapi.responses import JSONResponse, PlainTextResponse

from lesft.body_limit import bounded, says_too_much
from lesft.channel import is_loopback
from lesft.errors import (
    InvalidInput,
    LesftError,
    NotAllowed,
    NotAuthenticated,
    TooLarge,
    one_line,
    status_of,
)
from lesft.identity.registry import AccessToken
from lesft.live import PAGE_PATHS

log = logging.getLogger(__name__)

_ENROLMENT = ("/v1/authority", "/v1/enrolments")
OPEN_PATHS = frozenset((*PAGE_PATHS, *_ENROLMENT, "/healthz", "/readyz", "/openapi.json"))
"""What needs no token: none of it says anything about the run."""

MAX_BODY_BYTES = 64 << 10

_READS = ("GET", "HEAD", "OPTIONS")

FindToken = Callable[[str], AccessToken | None]


class AccessControl:
    """ASGI middleware in front of a control API, so that a new route is guarded by default."""

    def __init__(
        self,
        app: Any,
        find_token: FindToken | None,
        loopback: bool,
        where_from: str = "who runs the service makes one with its command 'token NAME'",
        names: Collection[str] = (),
    ) -> None:
        """Without `find_token` no tokens are asked for; `where_from` says who has them.

        `names` are those under which others reach this machine.

        `loopback` says that only this machine can connect: then a browser that shows a stranger's
        page must not be able to, either.
        """
        self._app = app
        self._find_token = find_token
        self._loopback = loopback
        self._where_from = where_from
        self._names = names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check_origin(headers)
            if says_too_much(headers, MAX_BODY_BYTES):
                raise TooLarge(f"a request may have {MAX_BODY_BYTES} bytes")
            if scope["path"] not in OPEN_PATHS:
                self._check_token(scope, headers.get(b"authorization", b""))
        except LesftError as error:
            await _refusal(error)(scope, receive, send)
            return
        if scope["path"] == "/readyz" and not self._may_look(scope, headers):
            await self._readiness_alone(scope, receive, send)
        else:
            await self._app(scope, bounded(receive, MAX_BODY_BYTES), send)

    def _may_look(self, scope: Any, headers: dict[bytes, bytes]) -> bool:
        try:
            self._check_token(scope, headers.get(b"authorization", b""))
        except LesftError:
            return False
        return True

    async def _readiness_alone(self, scope: Any, receive: Any, send: Any) -> None:
        """For probes, which have no token: the reason names clients, and what they have said."""
        status = 503

        async def look(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        await self._app(scope, bounded(receive, MAX_BODY_BYTES), look)
        text = "ok\n" if status == 200 else "not ready; with an access token this says why\n"
        await PlainTextResponse(text, status)(scope, receive, send)

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Refuse requests that a web page from elsewhere makes its reader's browser send."""
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            raise NotAllowed(f"origin: a page of {origin[:80]!r} may not use this API")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if host and not self._may_be_called(name):
            raise NotAllowed(
                "host: without tokens this API is asked for at 127.0.0.1 or localhost, beyond this "
                f"machine at its numbers or at --public-host, got {name[:80]!r}"
            )

    def _may_be_called(self, name: str) -> bool:
        """Whether no stranger can have made up this name for our address."""
        if self._loopback or self._find_token is None:
            beyond = not self._loopback and (_is_number(name) or name in self._names)
            return beyond or _is_local(name)
        return True

    def _check_token(self, scope: Any, authorization: bytes) -> None:
        method = scope["method"]
        if self._find_token is None:
            return
        scheme, _, text = authorization.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not text:
            raise NotAuthenticated(
                "an access token is needed, in the header 'Authorization: Bearer TOKEN'; "
                f"{self._where_from}"
            )
        token = self._find_token(text)
        if token is None:
            raise NotAuthenticated(
                "this access token is not known here, was revoked or has expired: ask the operator "
                "for another one"
            )
        if method not in _READS and token.role != "operator":
            raise NotAllowed(
                f"the access token of {token.name!r} is for looking only (viewer): orders need an "
                "operator's"
            )
        if method not in _READS:
            log.info("%s %s, by %s", method, one_line(scope["path"]), token.name)


def _is_local(host: str) -> bool:
    try:
        return is_loopback(f"{host}:0")
    except InvalidInput:
        return False


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _refusal(error: LesftError) -> JSONResponse:
    status = status_of(error).http
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    body = {"error": type(error).__name__, "message": str(error)}
    return JSONResponse(body, status, headers)
