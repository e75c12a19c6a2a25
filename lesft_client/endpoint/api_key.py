"""The key that requests must bring, where the endpoint's owner has set one."""

import hmac
import os
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from lesft.errors import InvalidInput
from lesft_client.endpoint.errors import Refused

VARIABLE = "LESFT_CLIENT_API_KEY"
_OPEN_PATHS = ("/healthz", "/readyz", "/metrics")


def read_api_key(path: Path | None) -> str | None:
    """The key in the file, or else in the environment; None when no key is asked for.

    It is no command-line option: others on the machine could read that. Raises InvalidInput for a
    file that cannot be read, and for an empty key.
    """
    if path is None:
        key, source = os.environ.get(VARIABLE), VARIABLE
    else:
        source = f"--api-key-file {path}"
        try:
            key = path.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{source} cannot be read: {error}") from None
    if key == "":
        raise InvalidInput(f"{source} is empty: it must hold the key that requests are to bring")
    return key


class RequireKey:
    """Around an app: answers 401 to requests without the key, but for health and metrics."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        app = self._app
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                app = _refuse
        await app(scope, receive, send)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    refused = Refused(
        401,
        "the request must bring this endpoint's key: Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
    await refused.response()(scope, receive, send)
