"""When a certificate ends, as a metric: renewing may fail, and somebody should hear of that."""

from collections.abc import Callable
from datetime import datetime

from prometheus_client import CollectorRegistry, Gauge


def show_expiry(registry: CollectorRegistry, who: str, expires: Callable[[], datetime]) -> None:
    """Add the gauge of a server, an aggregator or a client; `expires` is asked at each scrape."""
    gauge = Gauge(
        f"lesft_{who}_certificate_expiry_seconds",
        "When the certificate ends, in seconds since 1970.",
        registry=registry,
    )
    gauge.set_function(lambda: expires().timestamp())
