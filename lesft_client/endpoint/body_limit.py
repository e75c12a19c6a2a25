"""A request's body is bounded before any of it is read."""

from starlette.types import ASGIApp, Receive, Scope, Send

from lesft.body_limit import bounded, says_too_much
from lesft_client.endpoint.errors import Refused

MAX_BODY_BYTES = 8 << 20


class LimitBody:
    """Around an app: answers 413 to requests that are too large."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif says_too_much(dict(scope["headers"]), MAX_BODY_BYTES):
            message = f"a request may have {MAX_BODY_BYTES} bytes"
            await Refused(413, message, code="request_too_large").response()(scope, receive, send)
        else:
            await self._app(scope, bounded(receive, MAX_BODY_BYTES), send)
