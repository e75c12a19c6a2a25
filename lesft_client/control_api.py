"""The client's local control API."""

from typing import Literal

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from lesft.control import make_control_app
from lesft.live import Curve, LivePage
from lesft_client.status import Status, StatusBody, StatusFigures


class ClientSnapshot(BaseModel):
    """What the live page shows: the figures of /v1/status, and its rounds as a curve."""

    service: Literal["client"] = "client"
    status: StatusFigures
    curve: Curve


def make_app(status: Status, live: LivePage, registry: CollectorRegistry) -> FastAPI:
    """GET /v1/status beside what every control API has."""

    def ready() -> str | None:
        if status.waiting_for:
            return f"waiting for {status.waiting_for}"
        return None if status.phase == "training" else f"the client is {status.phase}"

    app = make_control_app("LESFT client", registry, ready)

    @app.get("/v1/status")
    async def get_status() -> StatusBody:
        """What the client is doing."""
        return status.body()

    async def snapshot() -> ClientSnapshot:
        body = status.body()
        return ClientSnapshot(
            status=StatusFigures(**body.model_dump(include=set(StatusFigures.model_fields))),
            curve=Curve.of(body.loss_by_round, body.nll_by_round),
        )

    live.add_to(app, f"{app.title} {status.client_id}", snapshot)
    return app
