"""The server's control API."""

from typing import Annotated, Literal

from fastapi import FastAPI, Query
from pydantic import BaseModel

from lesft.control import make_control_app
from lesft.live import Curve, LivePage
from lesft.spec import RunSpec
from lesft_server.generation import Generation
from lesft_server.metrics import Metrics
from lesft_server.run import RunState
from lesft_server.session import Engine

MAX_ROUNDS = 1000
"""In one answer of GET /v1/rounds."""


class RunBody(BaseModel):
    """Answer of GET /v1/run.

    `seconds_left` is an estimate from the last rounds, None before the first round's end.
    `steps_applied` are the micro-batches that the model has gone through and `lineage` is a SHA-256
    chain over them, both of the course that led to it: what was lost and done again counts once.
    """

    state: str
    reason: str
    waiting_for: str
    paused: bool
    rounds_done: int
    seconds_left: float | None
    steps_applied: int
    lineage: str
    clients_joined: int
    spec_fingerprint: str
    spec: RunSpec


class ClientBody(BaseModel):
    """One entry of GET /v1/clients. Shares are |D_i| / |D|; times are seconds since 1970.

    The bytes are those of its training streams since the server was started.
    """

    client_id: str
    num_samples: int
    share: float
    connected: bool
    next_round: int
    next_micro: int
    last_seen: float
    resumed: int
    away_because: str
    bytes_received: int
    bytes_sent: int


class RoundBody(BaseModel):
    """One entry of GET /v1/rounds. Loss and NLL are means by share, in nats."""

    round: int
    loss: float
    nll: float
    class_counts: tuple[int, int, int] | None
    seconds: float
    device_seconds: dict[str, float]
    """Where they went: keep, idle, cohort_wait, queue and back."""


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


class ServerSnapshot(BaseModel):
    """What the live page shows: the answers of the routes of these names, and the rounds' curve."""

    service: Literal["server"] = "server"
    run: RunBody
    clients: list[ClientBody]
    curve: Curve
    generation: GenerationBody


def make_app(engine: Engine, generation: Generation, live: LivePage, metrics: Metrics) -> FastAPI:
    """The run, its clients and its rounds beside what every control API has, and orders to the run.

    An order is a POST; each is safe to repeat and answers with the run.
    """
    run = engine.run

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
            seconds_left=run.seconds_left(),
            steps_applied=run.steps,
            lineage=run.lineage,
            clients_joined=len(run.members),
            spec_fingerprint=run.spec.fingerprint(),
            spec=run.spec,
        )

    app = make_control_app("LESFT server", metrics.registry, ready)

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
                bytes_received=run.members[name].wire.total("up"),
                bytes_sent=run.members[name].wire.total("down"),
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
        """The finished rounds from `first` on, at most 1000: ask on from there."""
        return [RoundBody(**vars(record)) for record in run.rounds[first : first + MAX_ROUNDS]]

    async def snapshot() -> ServerSnapshot:
        return ServerSnapshot(
            run=run_body(),
            clients=await get_clients(),
            curve=Curve.of(
                [record.loss for record in run.rounds], [record.nll for record in run.rounds]
            ),
            generation=await get_generation(),
        )

    live.add_to(app, app.title, snapshot)
    return app
