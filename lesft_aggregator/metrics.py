"""The aggregator's Prometheus metrics; docs/monitoring.md has them in a table."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, Summary
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lesft.intake import Intake
from lesft.refused_calls import RefusedCalls, RefusedRequests, limit_hits
from lesft_aggregator.rounds import Rounds
from lesft_aggregator.settings import AggregatorSettings
from lesft_aggregator.store import Store
from lesft_aggregator.tables import Adapter


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.refused_calls = RefusedCalls(self.registry, "lesft_aggregator")
        self.refused_requests = RefusedRequests(self.registry, "lesft_aggregator")
        self.limits = limit_hits(self.registry, "lesft_aggregator")
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
            "Bytes of adapters received by client, refused ones included; of clients that are not "
            "in the run under no name.",
            ["client"],
            registry=self.registry,
        )
        self.sent_bytes = Counter(
            "lesft_aggregator_sent_bytes",
            "Bytes of adapters sent by client.",
            ["client"],
            registry=self.registry,
        )
        self.averaging_seconds = Summary(
            "lesft_aggregator_averaging_seconds",
            "Time to average and store one version.",
            registry=self.registry,
        )

    def watch(self, rounds: Rounds, store: Store, settings: AggregatorSettings) -> None:
        """Show where the run stands from now on; read when asked, on the event loop."""
        self.version.set(rounds.version)
        self.registry.register(_RunCollector(rounds, store, settings))
        self.registry.register(_StoreCollector(rounds, store))

    def watch_intake(self, intake: Intake) -> None:
        """Show what is held for submissions that are being received."""
        self.registry.register(_IntakeCollector(intake))

    def published(self, adapter: Adapter, seconds: float) -> None:
        """A new version was averaged and stored in so many seconds."""
        self.version.set(adapter.version)
        self.averaging_seconds.observe(seconds)


class _IntakeCollector(Collector):
    """Memory for submissions that are being received."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        used, most = self._intake.used_bytes, self._intake.limit_bytes
        yield _gauge("receiving_bytes", "Memory held for what is being received.", used)
        yield _gauge("receiving_limit_bytes", "Most of it; the rest waits.", most)
        waiting = self._intake.num_waiting
        yield _gauge("receiving_waiting", "Submissions that wait for such memory.", waiting)


class _RunCollector(Collector):
    """The run and its open round."""

    def __init__(self, rounds: Rounds, store: Store, settings: AggregatorSettings) -> None:
        self._rounds = rounds
        self._store = store
        self._settings = settings

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        settings = self._settings
        info = GaugeMetricFamily(
            "lesft_aggregator_run_info", "The run: always 1.", labels=["run_id"]
        )
        info.add_metric([settings.run_id], 1)
        yield info
        submitted = self._store.submissions(self._rounds.version)
        first = min((part.received for part in submitted), default=None)
        yield _gauge("clients", "Clients that have joined.", len(self._store.clients()))
        yield _gauge("clients_expected", "Clients of each round.", settings.clients)
        yield _gauge("clients_required", "Those that suffice at the deadline.", settings.required)
        yield _gauge("clients_submitted", "Those in the open round.", len(submitted))
        yield _gauge(
            "open_round_seconds",
            "Since the open round's first submission; 0 before it.",
            max(0.0, time.time() - first) if first is not None else 0,
        )
        yield _gauge(
            "deadline_seconds",
            "What a round waits for its last; 0: for ever.",
            settings.deadline_seconds,
        )
        waits = bool(self._rounds.obstacle)
        yield _gauge("disk_wait", "1 while averaging waits for room on disk.", waits)


class _StoreCollector(Collector):
    """What the aggregator keeps on disk, and since when."""

    def __init__(self, rounds: Rounds, store: Store) -> None:
        self._rounds = rounds
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        newest = self._store.adapter(self._rounds.version)
        if newest is not None:
            age = max(0.0, time.time() - newest.created)
            yield _gauge("publish_age_seconds", "Since the newest version was published.", age)
        submitted = self._store.submissions(self._rounds.version)
        waiting = sum(part.num_bytes for part in submitted)
        yield _gauge("submission_bytes", "Disk in use by the open round's adapters.", waiting)
        published = self._store.adapter_bytes()
        yield _gauge("adapter_bytes", "Disk in use by the published versions.", published)
        yield _gauge("database_bytes", "Disk in use by the database.", self._store.database_bytes())


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lesft_aggregator_{name}", text, value=value)
