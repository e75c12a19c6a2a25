"""The Prometheus metrics of a client that trains; docs/monitoring.md has them in a table."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lesft.refused_calls import RefusedRequests
from lesft_client.status import Status


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self, status: Status) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.refused = RefusedRequests(self.registry, "lesft_client")
        self.registry.register(_StatusCollector(status))


class _StatusCollector(Collector):
    """The status, read when asked."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        status = self._status
        yield _info("run_info", "The run: always 1.", run_id=status.run_id, client=status.client_id)
        yield _info("phase_info", "What the client does: always 1.", phase=status.phase)
        yield _gauge("waiting", "1 while it waits for someone else.", bool(status.waiting_for))
        yield _counter("rounds", "Rounds done.", len(status.loss_by_round))
        yield _gauge("rounds_planned", "Rounds of the whole run.", status.rounds)
        yield _counter("tokens", "Tokens trained on.", status.tokens)
        yield _gauge("samples", "Samples that it trains on.", status.num_samples)
        version = status.adapter_version
        yield _gauge("adapter_version", "Version of the average that it trains from.", version)
        yield _gauge("in_flight", "Micro-batches without an answer yet.", status.in_flight)
        yield _counter("reconnects", "Connections that were made again.", status.reconnects)
        yield _last("loss", "Loss of the last round.", status.loss_by_round)
        yield _last("nll", "-log P per target token, last round, in nats.", status.nll_by_round)
        phases = CounterMetricFamily(
            "lesft_client_phase_seconds", "Time in each phase of the loop.", labels=["phase"]
        )
        for phase, seconds in dict(status.seconds_by_phase).items():
            phases.add_metric([phase], seconds)
        yield phases
        wire = CounterMetricFamily(
            "lesft_client_wire_bytes",
            "Bytes on the wire by direction and kind.",
            labels=["direction", "kind"],
        )
        for direction, kinds in status.wire.by_kind().items():
            for kind, count in kinds.items():
                wire.add_metric([direction, kind], count)
        yield wire


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lesft_client_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"lesft_client_{name}", text, value=value)


def _info(name: str, text: str, **labels: str) -> Metric:
    family = GaugeMetricFamily(f"lesft_client_{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


def _last(name: str, text: str, figures: list[float | None]) -> Metric:
    """Without a sample before the first round, and after one that went on without this client."""
    last = figures[-1] if figures else None
    family = GaugeMetricFamily(f"lesft_client_{name}", text)
    if last is not None:
        family.add_metric([], last)
    return family
