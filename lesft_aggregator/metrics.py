"""The aggregator's Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary

from lesft_aggregator.tables import Adapter


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.version = Gauge(
            "lesft_aggregator_version", "Newest published version.", registry=self.registry
        )
        self.submissions = Counter(
            "lesft_aggregator_submissions",
            "Submissions by result: accepted, repeated, or the name of the error.",
            ["result"],
            registry=self.registry,
        )
        self.received_bytes = Counter(
            "lesft_aggregator_received_bytes",
            "Bytes of adapters received, refused ones included.",
            registry=self.registry,
        )
        self.sent_bytes = Counter(
            "lesft_aggregator_sent_bytes", "Bytes of adapters sent.", registry=self.registry
        )
        self.averaging_seconds = Summary(
            "lesft_aggregator_averaging_seconds",
            "Time to average and store one version.",
            registry=self.registry,
        )

    def published(self, adapter: Adapter, seconds: float) -> None:
        """A new version was averaged and stored in so many seconds."""
        self.version.set(adapter.version)
        self.averaging_seconds.observe(seconds)
