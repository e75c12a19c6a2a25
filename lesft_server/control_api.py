"""The server's control API."""

from typing import Annotated

from fastapi import FastAPI, Query
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel

from lesft.control import make_control_app
from lesft.spec import RunSpec
from lesft_server.run import Run, RunState


class RunBody(BaseModel):
    """Answer of GET /v1/run."""

    state: str
    reason: str
    rounds_done: int
    clients_joined: int
    spec_fingerprint: str
    spec: RunSpec


class ClientBody(BaseModel):
    """One entry of GET /v1/clients. Shares are |D_i| / |D|; times are seconds since 1970."""

    client_id: str
    num_samples: int
    share: float
    connected: bool
    next_round: int
    next_micro: int
    last_seen: float


class RoundBody(BaseModel):
    """One entry of GET /v1/rounds. Loss and NLL are means by share, in nats."""

    round: int
    loss: float
    nll: float
    class_counts: tuple[int, int, int] | None
    seconds: float


def make_app(run: Run) -> FastAPI:
    """GET /v1/run, /v1/clients and /v1/rounds beside what every control API has."""
    registry = CollectorRegistry()
    registry.register(_RunCollector(run))

    def ready() -> str | None:
        return f"the run has ended: {run.reason}" if run.state is RunState.STOPPED else None

    app = make_control_app("LESFT server", registry, ready)

    @app.get("/v1/run")
    async def get_run() -> RunBody:
        """What the run is and where it stands."""
        return RunBody(
            state=run.state.value,
            reason=run.reason,
            rounds_done=len(run.rounds),
            clients_joined=len(run.members),
            spec_fingerprint=run.spec.fingerprint(),
            spec=run.spec,
        )

    @app.get("/v1/clients")
    async def get_clients() -> list[ClientBody]:
        """The clients of the run, in the order of every cohort."""
        return [
            ClientBody(
                client_id=name,
                num_samples=run.members[name].num_samples,
                share=share,
                connected=run.members[name].connected,
                next_round=run.members[name].next_key.round,
                next_micro=run.members[name].next_key.micro,
                last_seen=run.members[name].last_seen,
            )
            for name, share in run.shares().items()
        ]

    @app.get("/v1/rounds")
    async def get_rounds(first: Annotated[int, Query(ge=0)] = 0) -> list[RoundBody]:
        """The finished rounds from `first` on."""
        return [RoundBody(**vars(record)) for record in run.rounds[first:]]

    return app


class _RunCollector(Collector):
    """The run as Prometheus metrics, read when asked."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def collect(self) -> list[Metric]:
        """Called by the registry at each scrape."""
        rounds = self._run.rounds
        connected = sum(member.connected for member in self._run.members.values())
        metrics: list[Metric] = [
            CounterMetricFamily("lesft_server_rounds", "Rounds done.", value=len(rounds)),
            GaugeMetricFamily("lesft_server_clients", "Clients connected.", value=connected),
        ]
        if rounds:
            loss, seconds = rounds[-1].loss, rounds[-1].seconds
            metrics += [
                GaugeMetricFamily("lesft_server_loss", "Loss of the last round.", value=loss),
                GaugeMetricFamily(
                    "lesft_server_round_seconds", "Length of the last round.", value=seconds
                ),
            ]
        return metrics
