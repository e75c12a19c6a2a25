"""OpenAI's HTTP API over a language model."""

import asyncio
import time
from contextlib import aclosing

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry

from lesft.control import make_control_app
from lesft_client.endpoint.answers import CHAT, COMPLETION, Answer, Json, Pieces, Shape
from lesft_client.endpoint.api_key import RequireKey
from lesft_client.endpoint.asking import Asked, Defaults, ask_chat, ask_completion
from lesft_client.endpoint.bodies import ChatBody, CompletionBody, WritingBody
from lesft_client.endpoint.body_limit import LimitBody
from lesft_client.endpoint.errors import Refused, add_error_bodies
from lesft_client.endpoint.metrics import CountRequests, Metrics
from lesft_client.endpoint.writer import HungUp, Writer, unless_hung_up
from lesft_client.language_model import LanguageModel, Piece

_HUNG_UP = 499
"""As nginx has it: nobody will read this answer."""
_NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies are to pass events on as they come."""


class Endpoint:
    """The app, and what it is made of."""

    def __init__(self, model: LanguageModel, defaults: Defaults, api_key: str | None) -> None:
        self._model = model
        self._defaults = defaults
        self._created = int(time.time())
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        self._writer = Writer(model, metrics)
        self.app: FastAPI = make_control_app("LESFT endpoint", registry, lambda: None)
        add_error_bodies(self.app)
        self.app.include_router(self._routes())
        if api_key is not None:
            self.app.add_middleware(RequireKey, api_key=api_key)
        self.app.add_middleware(LimitBody)
        self.app.add_middleware(CountRequests, metrics=metrics)

    def stop(self) -> None:
        """End what is being written with an error that says so, and refuse what comes later."""
        self._writer.stop()

    def _routes(self) -> APIRouter:
        router = APIRouter(prefix="/v1")

        @router.get("/models")
        async def list_models() -> Json:
            """The one model that this endpoint has."""
            return {"object": "list", "data": [self._model_body()]}

        @router.get("/models/{name:path}")
        async def get_model(name: str) -> Json:
            """That model, by its name or the last part of its name."""
            self._check_model(name)
            return self._model_body()

        @router.post("/chat/completions", response_model=None)
        async def chat(request: Request, body: ChatBody) -> Response:
            """The model's next turn in a conversation."""
            self._check_model(body.model)
            asked = await asyncio.to_thread(ask_chat, body, self._model, self._defaults)
            return await self._respond(request, body, CHAT, asked)

        @router.post("/completions", response_model=None)
        async def completions(request: Request, body: CompletionBody) -> Response:
            """How the model goes on with texts."""
            self._check_model(body.model)
            asked = await asyncio.to_thread(ask_completion, body, self._model, self._defaults)
            return await self._respond(request, body, COMPLETION, asked)

        return router

    def _model_body(self) -> Json:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "lesft",
            "max_model_len": self._model.max_length,
        }

    def _check_model(self, name: str) -> None:
        known = self._model.name
        if name not in (known, known.rpartition("/")[2]):
            message = f"the model {name[:200]!r} does not exist here; this endpoint has {known!r}"
            raise Refused(404, message, "model", "model_not_found")

    async def _respond(
        self, request: Request, body: WritingBody, shape: Shape, asked: Asked
    ) -> Response:
        """Errors before the first piece have a status of their own, in a stream as well."""
        answer = Answer(
            shape, self._model.name, self._model.fingerprint, asked.prefixes, asked.num_tokens
        )
        pieces = self._writer.write(asked.requests)
        try:
            if not body.stream:
                return JSONResponse(await unless_hung_up(request, answer.whole(pieces)))
            first = await unless_hung_up(request, anext(pieces))
        except HungUp:
            return Response(status_code=_HUNG_UP)
        events = answer.events(_with_first(first, pieces), body.wants_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=_NO_CACHE)


async def _with_first(first: tuple[int, Piece], pieces: Pieces) -> Pieces:
    async with aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece
