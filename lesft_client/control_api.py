"""The client's local control API."""

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lesft.control import make_control_app
from lesft_client.status import Status, StatusBody


def make_app(status: Status) -> FastAPI:
    """GET /v1/status beside what every control API has."""
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status))

    def ready() -> str | None:
        if status.waiting_for:
            return f"waiting for {status.waiting_for}"
        return None if status.phase == "training" else f"the client is {status.phase}"

    app = make_control_app("LESFT client", registry, ready)

    @app.get("/v1/status")
    async def get_status() -> StatusBody:
        """What the client is doing."""
        return status.body()

    return app


class _StatusCollector(Collector):
    """The status as Prometheus metrics, read when asked."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> list[Metric]:
        """Called by the registry at each scrape."""
        body = self._status.body()
        wire = CounterMetricFamily(
            "lesft_client_wire_bytes",
            "Bytes on the wire by direction and kind.",
            labels=["direction", "kind"],
        )
        for direction, kinds in self._status.wire.by_kind().items():
            for kind, count in kinds.items():
                wire.add_metric([direction, kind], count)
        rounds = CounterMetricFamily("lesft_client_rounds", "Rounds done.", value=body.round)
        tokens = CounterMetricFamily("lesft_client_tokens", "Tokens trained on.", value=body.tokens)
        metrics: list[Metric] = [wire, rounds, tokens]
        if body.loss is not None:
            metrics.append(
                GaugeMetricFamily("lesft_client_loss", "Loss of the last round.", value=body.loss)
            )
        return metrics
