"""The gRPC inference service: one stream per sequence that a client writes."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from grpc.aio import ServicerContext

from lesft.batching import LARGE_STEP
from lesft.bundle import BundleReader, check_announced
from lesft.call_limits import name_of_caller
from lesft.errors import BundleError, OutOfOrder, Unreachable
from lesft.inference_messages import (
    Reply,
    hidden_bytes,
    hidden_from_bundle,
    question_of,
    reply_to_message,
)
from lesft.intake import Intake
from lesft.norms import ActivationNorms
from lesft.spec import RunSpec
from lesft.v1 import heartbeat_pb2, inference_pb2, inference_pb2_grpc
from lesft_server.generation import Generation, ServedSequence
from lesft_server.handshake import check_sequence

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

_Requests = AsyncIterator[inference_pb2.GenerateRequest]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The back of the model, step by step."""

    def __init__(
        self,
        generation: Generation,
        spec: RunSpec,
        heartbeat_seconds: float,
        idle_seconds: float,
        intake: Intake,
        norms: ActivationNorms,
    ) -> None:
        """A sequence ends when its client sends or reads nothing for `idle_seconds`."""
        self._generation = generation
        self._spec = spec
        self._heartbeat_seconds = heartbeat_seconds
        self._idle_seconds = idle_seconds
        self._intake = intake
        self._norms = norms

    async def Generate(
        self,
        request_iterator: _Requests,
        context: ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """See inference.proto."""
        loop, call = asyncio.get_running_loop(), asyncio.current_task()
        assert call is not None
        client = name_of_caller(context)
        async with aclosing(self._responses(aiter(request_iterator), client)) as responses:
            async for response in responses:
                not_read = loop.call_later(self._idle_seconds, call.cancel)
                try:
                    yield response
                finally:
                    not_read.cancel()

    async def _responses(
        self, requests: _Requests, client: str
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        opening = await self._next(requests)
        if opening is None or opening.WhichOneof("message") != "open":
            raise OutOfOrder("the first message of a sequence must be open")
        options = check_sequence(opening.open, self._spec, self._generation.rounds)
        sequence = self._generation.open(options, client)
        try:
            yield inference_pb2.GenerateResponse(
                opened=inference_pb2.SequenceOpened(heartbeat_seconds=self._heartbeat_seconds)
            )
            while (request := await self._next(requests)) is not None:
                if request.WhichOneof("message") != "step":
                    raise OutOfOrder(
                        f"{request.WhichOneof('message') or 'an empty message'} came where a step "
                        "was due"
                    )
                answer = asyncio.create_task(self._answer(request.step, sequence, requests))
                try:
                    while not answer.done():
                        await asyncio.wait({answer}, timeout=self._heartbeat_seconds)
                        if not answer.done():
                            heartbeat = heartbeat_pb2.Heartbeat()
                            yield inference_pb2.GenerateResponse(heartbeat=heartbeat)
                    result, more = reply_to_message(request.step.index, answer.result())
                finally:
                    answer.cancel()
                yield inference_pb2.GenerateResponse(result=result)
                for chunk in more:
                    yield inference_pb2.GenerateResponse(chunk=chunk)
        finally:
            sequence.close()

    async def _answer(
        self,
        step: inference_pb2.DecodeStep,
        sequence: ServedSequence,
        requests: _Requests,
    ) -> Reply:
        config = self._generation.back.model.config
        question = question_of(step, config.vocab_size)
        sequence.check_step(step.index, step.tokens, step.right_guesses)
        most = hidden_bytes(step.tokens, config.hidden_size)
        check_announced(step.bundle, most)
        async with self._intake.room(step.bundle.total_bytes):
            reader = BundleReader(step.bundle, most)
            reader.add(step.chunk)
            while not reader.complete:
                request = await self._next(requests)
                if request is None or request.WhichOneof("message") != "chunk":
                    raise BundleError(f"chunk {reader.next_index} of a bundle is missing")
                reader.add(request.chunk)
        size, encoding = config.hidden_size, self._spec.inference_encoding
        if step.tokens > LARGE_STEP:
            data = await asyncio.to_thread(reader.data)
            hidden_QD = await asyncio.to_thread(
                hidden_from_bundle, data, step.tokens, size, encoding
            )
        else:  # a thread would take longer than the work
            hidden_QD = hidden_from_bundle(reader.data(), step.tokens, size, encoding)
        hidden_QD = self._norms.admit("hidden", hidden_QD)
        return await sequence.decode(hidden_QD, step.guesses, step.right_guesses, question)

    async def _next(self, requests: _Requests) -> inference_pb2.GenerateRequest | None:
        """The client's next message; None when it has closed the stream."""
        seconds = self._idle_seconds
        try:
            return await asyncio.wait_for(anext(requests, None), seconds)
        except asyncio.TimeoutError:
            raise Unreachable(
                f"nothing came for this sequence for {seconds:g} s (--idle-seconds): open another "
                "one and send its tokens again"
            ) from None
