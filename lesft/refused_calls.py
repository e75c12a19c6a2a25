"""What a service has refused, counted for its metrics: calls, requests, what was over a limit."""

import logging
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lesft.errors import LesftError
from lesft.refusals import Refusals

log = logging.getLogger(__name__)

QUIET_SECONDS = 60
"""How often the refusals of one kind are logged: strangers must not be able to fill the log."""


class RefusedCalls:
    """Counter by RPC and error class: nothing that strangers make up."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        """`prefix` is that of the service's metrics, such as lesft_server."""
        self._calls = Counter(
            f"{prefix}_refusals",
            "Calls that ended with an error, by RPC and by the error's class.",
            ["method", "error"],
            registry=registry,
        )
        self._logged: dict[tuple[str, str], float] = {}

    def count(self, method: str, error: LesftError) -> None:
        """Count a call, and log the first in a while; see `lesft.interceptors.OnRefused`."""
        kind = method, type(error).__name__
        self._calls.labels(*kind).inc()
        now = time.monotonic()
        if now - self._logged.get(kind, -QUIET_SECONDS) >= QUIET_SECONDS:
            self._logged[kind] = now
            # Without its message, which may quote what it is about.
            log.info("a call of %s ended with %s", method.rpartition("/")[2], kind[1])


class RefusedRequests:
    """Counter of a control API's errors by HTTP status."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        self._requests = Counter(
            f"{prefix}_http_refusals",
            "Requests to the control API that were answered with an error, by HTTP status.",
            ["status"],
            registry=registry,
        )

    def around(self, app: ASGIApp) -> ASGIApp:
        """The app and what guards it, with its requests counted."""
        return _Counting(app, self._requests)


def limit_hits(registry: CollectorRegistry, prefix: str) -> Refusals:
    """Where to count what is refused or cut down because of a limit."""
    limits = Refusals()
    registry.register(_LimitCollector(limits, f"{prefix}_limit_hits"))
    return limits


class _LimitCollector(Collector):
    """Limits that were met."""

    def __init__(self, limits: Refusals, name: str) -> None:
        self._limits = limits
        self._name = name

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        hits = CounterMetricFamily(
            self._name,
            "What was refused or cut down because of a limit, by reason.",
            labels=["reason"],
        )
        for reason, count in self._limits.counts.items():
            hits.add_metric([reason], count)
        yield hits


class _Counting:
    """ASGI middleware around a whole control API, with what guards it."""

    def __init__(self, app: ASGIApp, requests: Counter) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""

        async def watched(message: Message) -> None:
            # A 503 of /readyz is its way of saying no, to whoever asks every few seconds.
            if message["type"] == "http.response.start" and scope["path"] != "/readyz":
                status: int = message["status"]
                if status >= 400:
                    self._requests.labels(str(status)).inc()
            await send(message)

        await self._app(scope, receive, watched)
