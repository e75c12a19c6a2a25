"""What the endpoint counts, and the layer around the app that counts requests."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COUNTED_PATHS = ("/v1/chat/completions", "/v1/completions")
_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Requests, their seconds, those in flight, and tokens."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tokens = Counter(
            "lesft_endpoint_tokens", "Tokens read and written.", ["kind"], registry=registry
        )
        self.requests = Counter(
            "lesft_endpoint_requests",
            "Requests that have ended, by path and by HTTP status.",
            ["path", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "lesft_endpoint_seconds",
            "Seconds from a request's beginning to the end of its answer.",
            ["path"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "lesft_endpoint_in_flight", "Requests being answered now.", registry=registry
        )

    def prompt_tokens(self, count: int) -> None:
        """Count tokens of a prompt."""
        self._tokens.labels("prompt").inc(count)

    def completion_tokens(self, count: int) -> None:
        """Count tokens that were written."""
        self._tokens.labels("completion").inc(count)


class CountRequests:
    """Around an app: counts its requests to the paths that write."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope.get("path", "")
        if path not in COUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        status = 499  # as nginx counts a client that hung up before it had an answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.monotonic()
        try:
            with self._metrics.in_flight.track_inprogress():
                await self._app(scope, receive, watched)
        finally:
            self._metrics.seconds.labels(path).observe(time.monotonic() - started)
            self._metrics.requests.labels(path, str(status)).inc()
