"""The HTTP side that every service has: health, readiness, metrics, errors, and its server.

Loads no torch. A service makes its app with `make_control_app`, adds its own routes under /v1,
and serves it with a `ControlServer`.
"""

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from lesft.bad_requests import CarefulProtocol
from lesft.channel import check_open, split_address
from lesft.errors import InternalError, InvalidInput, LesftError, NotFound, Unreachable, status_of
from lesft.files import write_atomically

ENDPOINTS_FILE = "endpoints.json"


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: str
    """Name of the error's class in lesft.errors."""
    message: str


def make_control_app(
    title: str, registry: CollectorRegistry, ready: Callable[[], str | None]
) -> FastAPI:
    """An app with /healthz, /readyz, /metrics, /openapi.json and our error bodies.

    `ready` says why the service is not ready, or None when it is. The description is served as
    JSON only: a docs page would load its scripts from other people's servers.
    """
    app = FastAPI(
        title=title,
        docs_url=None,
        redoc_url=None,
        responses={422: {"model": ErrorBody}, 404: {"model": ErrorBody}},
    )

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """Answers as long as the process lives."""
        return "ok\n"

    not_ready: dict[int | str, dict[str, Any]] = {
        503: {"description": "Not ready; the body says why."}
    }

    @app.get("/readyz", response_class=PlainTextResponse, responses=not_ready)
    async def readyz() -> PlainTextResponse:
        """200 when the service can do its work, else 503 and the reason."""
        reason = ready()
        return PlainTextResponse(f"{reason or 'ok'}\n", 503 if reason else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The service's metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    _add_error_bodies(app)
    return app


def _add_error_bodies(app: FastAPI) -> None:
    @app.exception_handler(LesftError)
    async def lesft_error(request: Request, error: LesftError) -> Response:
        return _error(status_of(error).http, type(error), str(error))

    @app.exception_handler(RequestValidationError)
    async def wrong_value(request: Request, error: RequestValidationError) -> Response:
        lines = [
            f"{'.'.join(map(str, detail['loc'][1:]))}: {detail['msg']}, got {detail['input']!r}"
            for detail in error.errors()
        ]
        return _error(422, InvalidInput, "; ".join(lines))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        kind = NotFound if error.status_code == 404 else InvalidInput
        asked = f"{request.method} {request.url.path}"
        message = f"{asked}: {error.detail}; /openapi.json lists every path"
        return _error(error.status_code, kind, message, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        # The web server logs it with its traceback.
        return _error(500, InternalError, "internal error; the service's log has the details")


def _error(
    status: int, kind: type[LesftError], message: str, headers: Mapping[str, str] | None = None
) -> Response:
    body = ErrorBody(error=kind.__name__, message=message)
    return JSONResponse(body.model_dump(), status, headers)


def https_context() -> ssl.SSLContext:
    """TLS for a listener of ours; it needs a certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class ControlServer:
    """Serves an app over HTTP, on the caller's event loop or in a thread of its own.

    Installs no signal handlers: the service owns those.
    """

    def __init__(self, app: ASGIApp, insecure: bool, tls: ssl.SSLContext | None = None) -> None:
        """`insecure` allows addresses beyond this machine without `tls`; see `check_open`."""
        config = uvicorn.Config(
            app,
            ssl_context_factory=None if tls is None else lambda config, default: tls,
            http=CarefulProtocol,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=2,
        )
        self._server = _QuietServer(config)
        self.scheme = "http" if tls is None else "https"
        self._may_be_open = insecure or tls is not None
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None

    async def start(self, address: str) -> str:
        """Serve on the running event loop; returns the real address (port 0 takes a free one).

        Raises InvalidInput for an address that is malformed or open by accident, Unreachable
        when it cannot be listened on.
        """
        self._socket, real_address = _listen(address, self._may_be_open)
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        return real_address

    async def stop(self) -> None:
        """Finish what is being answered, then stop. Safe to call when never started."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._close()

    def start_in_thread(self, address: str) -> str:
        """As `start`, for a program that is not asynchronous."""
        self._socket, real_address = _listen(address, self._may_be_open)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="control", daemon=True
        )
        self._thread.start()
        return real_address

    def stop_thread(self) -> None:
        """Stop what `start_in_thread` started. Safe to call when never started."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._close()

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()


class _QuietServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(address: str, may_be_open: bool) -> tuple[socket.socket, str]:
    check_open(address, may_be_open)
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        # Python appends the address in brackets, which the message has already.
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise Unreachable(
            f"cannot listen on {address}: {reason}; choose another address, or port 0 for any "
            "free one"
        ) from None
    # Accepted connections inherit it. Without it, the body of an answer waits 40 ms for the
    # acknowledgement of its head: asyncio sees to that only for sockets it has made itself.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    real_port = listening.getsockname()[1]
    return listening, f"[{host}]:{real_port}" if ":" in host else f"{host}:{real_port}"


def write_endpoints(state_dir: Path, addresses: Mapping[str, str]) -> None:
    """Leave the real addresses in endpoints.json, for whoever started the service on port 0.

    `addresses` maps "grpc" and "control" to HOST:PORT, and where the service has clients
    "service" to its kind, "tls" to "off", "own" or "site", and "public_host" to that setting. The
    file appears whole or not at all.
    """
    write_atomically(state_dir / ENDPOINTS_FILE, json.dumps(dict(addresses)).encode())
