"""The aggregator's REST API: what an operator may see. Nothing here changes anything."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import FastAPI, Path
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from lesft.control import make_control_app
from lesft.errors import NotFound
from lesft.live import LivePage
from lesft.spec import PROTOCOL_VERSION
from lesft_aggregator import tables
from lesft_aggregator.metrics import Metrics
from lesft_aggregator.rounds import Rounds, RoundState
from lesft_aggregator.settings import AggregatorSettings
from lesft_aggregator.store import Store

VERSIONS_SHOWN = 20
"""On the live page; /v1/rounds has them all."""

Version = Annotated[int, Path(ge=1, lt=2**32, description="Version of the averaged adapter.")]


class RunView(BaseModel):
    """The run and its rules."""

    run_id: str
    protocol_version: int
    clients: int = Field(description="Clients expected in each round.")
    quorum: int = Field(description="Clients that suffice once the deadline has passed.")
    deadline_seconds: float = Field(description="Deadline after the first submission; 0: none.")
    version: int = Field(description="Newest published version; 0: nothing averaged yet.")
    waiting_for: str = Field(description="What the open round waits for, in words.")
    ended: str = Field(description="Why no round goes on any more; empty while they do.")


class ClientView(BaseModel):
    """A client that has joined or submitted."""

    client_id: str
    num_samples: int = Field(description="Size of its data set in samples, as it said last.")
    joined: datetime
    last_base_version: int | None = Field(description="Version of its newest submission, if any.")


class RoundView(BaseModel):
    """One round, published or not."""

    version: int = Field(description="Version that the round makes or made.")
    state: RoundState
    client_ids: list[str] = Field(description="Clients whose submissions are in it.")
    missing: list[str] = Field(description="Known clients that the open round waits for.")
    deadline: datetime | None = Field(description="When the quorum suffices, once that is known.")


class AdapterView(BaseModel):
    """A published version."""

    version: int
    client_ids: list[str] = Field(description="Clients that it averages, in order of the sum.")
    num_samples: int = Field(description="Sum of their data-set sizes in samples.")
    num_bytes: int = Field(description="Size of its safetensors file.")
    sha256: str = Field(description="Digest of that file.")
    created: datetime


class AggregatorSnapshot(BaseModel):
    """What the live page shows: answers of the routes, of the newest versions only."""

    service: Literal["aggregator"] = "aggregator"
    run: RunView
    clients: list[ClientView]
    round: RoundView
    versions: list[AdapterView]
    """Newest first, at most VERSIONS_SHOWN."""


def make_app(
    rounds: Rounds, store: Store, settings: AggregatorSettings, metrics: Metrics, live: LivePage
) -> FastAPI:
    """The control app with the aggregator's routes."""

    def not_ready() -> str | None:
        return str(rounds.ended) if rounds.ended else rounds.obstacle or None

    app = make_control_app("LESFT aggregator", metrics.registry, not_ready)

    @app.get("/v1/run")
    async def run() -> RunView:
        """The run and its rules."""
        return RunView(
            run_id=settings.run_id,
            protocol_version=PROTOCOL_VERSION,
            clients=settings.clients,
            quorum=settings.required,
            deadline_seconds=settings.deadline_seconds,
            version=rounds.version,
            waiting_for="" if rounds.ended else rounds.waiting_for(),
            ended=str(rounds.ended or ""),
        )

    @app.get("/v1/clients")
    async def clients() -> list[ClientView]:
        """All clients, by name."""
        last = store.last_submissions()
        return [_client_view(client, last.get(client.client_id)) for client in store.clients()]

    @app.get("/v1/rounds")
    async def all_rounds() -> list[RoundView]:
        """All rounds, oldest first; the last one is open or being averaged."""
        published = [
            RoundView(
                version=adapter.version,
                state=RoundState.PUBLISHED,
                client_ids=adapter.client_ids,
                missing=[],
                deadline=None,
            )
            for adapter in store.adapters()
        ]
        return [*published, _current_view(rounds, store)]

    @app.get("/v1/adapters/{version}")
    async def adapter(version: Version) -> AdapterView:
        """What is known of a published version."""
        return _adapter_view(_published(rounds, store, version))

    @app.get("/v1/adapters/{version}/file", response_class=FileResponse)
    async def adapter_file(version: Version) -> FileResponse:
        """The averaged tensors as a safetensors file."""
        _published(rounds, store, version)
        path = store.adapter_path(version)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    async def snapshot() -> AggregatorSnapshot:
        return AggregatorSnapshot(
            run=await run(),
            clients=await clients(),
            round=_current_view(rounds, store),
            versions=[_adapter_view(adapter) for adapter in store.newest_adapters(VERSIONS_SHOWN)],
        )

    live.add_to(app, app.title, snapshot)
    return app


def _published(rounds: Rounds, store: Store, version: int) -> tables.Adapter:
    adapter = store.adapter(version)
    if adapter is None:
        raise NotFound(
            f"version {version} is not published: the newest is {rounds.version} (0 is none)"
        )
    return adapter


def _client_view(client: tables.Client, last_base_version: int | None) -> ClientView:
    return ClientView(
        client_id=client.client_id,
        num_samples=client.num_samples,
        joined=client.joined,
        last_base_version=last_base_version,
    )


def _current_view(rounds: Rounds, store: Store) -> RoundView:
    current = rounds.current
    return RoundView(
        version=current.base_version + 1,
        state=current.state,
        client_ids=[part.client_id for part in store.submissions(current.base_version)],
        missing=rounds.missing(),
        deadline=current.deadline,
    )


def _adapter_view(adapter: tables.Adapter) -> AdapterView:
    return AdapterView(
        version=adapter.version,
        client_ids=adapter.client_ids,
        num_samples=adapter.num_samples,
        num_bytes=adapter.num_bytes,
        sha256=adapter.sha256,
        created=adapter.created,
    )
