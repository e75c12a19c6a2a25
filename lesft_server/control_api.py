"""The server's control API."""

from typing import Annotated

from fastapi import FastAPI, Query
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel

from lesft.control import make_control_app
from lesft.spec import RunSpec
from lesft_server.generation import Generation
from lesft_server.run import Run, RunState
from lesft_server.sample_store import SampleStore
from lesft_server.session import Engine


class RunBody(BaseModel):
    """Answer of GET /v1/run.

    `steps_applied` are the micro-batches that the model has gone through and `lineage` is a SHA-256
    chain over them, both of the course that led to it: what was lost and done again counts once.
    """

    state: str
    reason: str
    waiting_for: str
    paused: bool
    rounds_done: int
    steps_applied: int
    lineage: str
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
    resumed: int
    away_because: str


class RoundBody(BaseModel):
    """One entry of GET /v1/rounds. Loss and NLL are means by share, in nats."""

    round: int
    loss: float
    nll: float
    class_counts: tuple[int, int, int] | None
    seconds: float


class GenerationBody(BaseModel):
    """Answer of GET /v1/generation: the texts being written, and what was written so far."""

    sequences: int
    max_sequences: int
    max_context: int
    cache_bytes_reserved: int
    cache_bytes: int
    tokens: int
    batches: int
    mean_batch: float


def make_app(engine: Engine, generation: Generation) -> FastAPI:
    """The run, its clients and its rounds beside what every control API has, and orders to the run.

    An order is a POST; each is safe to repeat and answers with the run.
    """
    run = engine.run
    registry = CollectorRegistry()
    registry.register(_RunCollector(run, engine.samples))
    registry.register(_GenerationCollector(generation))

    def ready() -> str | None:
        if run.state is RunState.STOPPED:
            return f"the run has ended: {run.reason}"
        due = engine.cohort.due()
        held_up = run.obstacle or any(not run.members[name].connected for name in due)
        if run.state is RunState.TRAINING and held_up:
            return f"waiting for {run.waiting_for(due)}"
        return None

    def run_body() -> RunBody:
        return RunBody(
            state=run.state.value,
            reason=run.reason,
            waiting_for=run.waiting_for(engine.cohort.due()),
            paused=run.paused,
            rounds_done=len(run.rounds),
            steps_applied=run.steps,
            lineage=run.lineage,
            clients_joined=len(run.members),
            spec_fingerprint=run.spec.fingerprint(),
            spec=run.spec,
        )

    app = make_control_app("LESFT server", registry, ready)

    @app.get("/v1/run")
    async def get_run() -> RunBody:
        """What the run is and where it stands."""
        return run_body()

    @app.post("/v1/pause")
    async def pause() -> RunBody:
        """Take no further step until /v1/resume; the clients stay and wait."""
        run.pause()
        return run_body()

    @app.post("/v1/resume")
    async def resume() -> RunBody:
        """Take steps again."""
        run.go_on()
        return run_body()

    @app.post("/v1/checkpoint")
    async def checkpoint() -> RunBody:
        """Take a checkpoint on all sides at the end of the round that is under way."""
        run.checkpoint_wanted = True
        return run_body()

    @app.post("/v1/stop")
    async def stop() -> RunBody:
        """Stop after the round that is under way; started again, the run goes on from there."""
        engine.cohort.stop_after_round()
        return run_body()

    @app.delete("/v1/clients/{client_id}")
    async def drop(client_id: str) -> RunBody:
        """Go on without a client for good. The aggregator has to be told too: see its --clients."""
        if client_id in run.members:
            await engine.journal.drop(client_id)
        run.drop(client_id)
        return run_body()

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
                resumed=run.members[name].resumed,
                away_because="" if run.members[name].connected else run.members[name].away_because,
            )
            for name, share in run.shares().items()
        ]

    @app.get("/v1/generation")
    async def get_generation() -> GenerationBody:
        """What clients are writing with the model."""
        batches, steps = generation.batches
        return GenerationBody(
            sequences=len(generation.sequences),
            max_sequences=generation.max_sequences,
            max_context=generation.max_context,
            cache_bytes_reserved=generation.bytes_reserved,
            cache_bytes=generation.cache_bytes,
            tokens=generation.tokens,
            batches=batches,
            mean_batch=steps / batches if batches else 0.0,
        )

    @app.get("/v1/rounds")
    async def get_rounds(first: Annotated[int, Query(ge=0)] = 0) -> list[RoundBody]:
        """The finished rounds from `first` on."""
        return [RoundBody(**vars(record)) for record in run.rounds[first:]]

    return app


class _RunCollector(Collector):
    """The run as Prometheus metrics, read when asked."""

    def __init__(self, run: Run, samples: SampleStore) -> None:
        self._run = run
        self._samples = samples

    def collect(self) -> list[Metric]:
        """Called by the registry at each scrape."""
        rounds = self._run.rounds
        connected = sum(member.connected for member in self._run.members.values())
        metrics: list[Metric] = [
            CounterMetricFamily("lesft_server_rounds", "Rounds done.", value=len(rounds)),
            GaugeMetricFamily("lesft_server_clients", "Clients connected.", value=connected),
            GaugeMetricFamily(
                "lesft_server_kept_activation_bytes",
                "Disk in use for activations of clients that do not train.",
                value=self._samples.num_bytes,
            ),
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


class _GenerationCollector(Collector):
    """Split decoding as Prometheus metrics, read when asked."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def collect(self) -> list[Metric]:
        """Called by the registry at each scrape."""
        generation = self._generation
        batches, steps = generation.batches
        return [
            GaugeMetricFamily(
                "lesft_server_sequences", "Texts being written.", value=len(generation.sequences)
            ),
            GaugeMetricFamily(
                "lesft_server_cache_bytes_reserved",
                "Memory reserved for keys and values.",
                value=generation.bytes_reserved,
            ),
            CounterMetricFamily(
                "lesft_server_decoded_tokens",
                "Tokens through the back for inference.",
                value=generation.tokens,
            ),
            CounterMetricFamily("lesft_server_decode_batches", "Batches of them.", value=batches),
            CounterMetricFamily("lesft_server_decode_steps", "Steps in these.", value=steps),
        ]
