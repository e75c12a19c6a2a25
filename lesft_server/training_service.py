"""The gRPC training service: opens sessions and passes messages; no mathematics here."""

import asyncio
from collections.abc import AsyncIterator

from grpc.aio import ServicerContext

from lesft.errors import LesftError, OutOfOrder
from lesft.identity.caller import check_acts_for_itself
from lesft.identity.guard import why_ended
from lesft.refusals import Refusals
from lesft.spec_messages import spec_to_message
from lesft.v1 import training_pb2, training_pb2_grpc
from lesft_server.handshake import check_opening
from lesft_server.session import Engine, Session

_GRACE_SECONDS = 5
"""How long a call may take to end once its session has."""

SERVICE_NAME = training_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """One bidirectional stream per client."""

    def __init__(self, engine: Engine, refusals: Refusals) -> None:
        self._engine = engine
        self._refusals = refusals
        self._spec = spec_to_message(engine.run.spec)

    async def Train(
        self,
        request_iterator: AsyncIterator[training_pb2.TrainRequest],
        context: ServicerContext[training_pb2.TrainRequest, training_pb2.TrainResponse],
    ) -> AsyncIterator[training_pb2.TrainResponse]:
        """See training.proto."""
        requests = aiter(request_iterator)
        session = await self._open(requests, context)
        receiving = asyncio.create_task(session.receive(requests))
        # A client that reads nothing must not keep its call for ever.
        loop, call = asyncio.get_running_loop(), asyncio.current_task()
        assert call is not None
        session.on_end(lambda: loop.call_later(_GRACE_SECONDS, call.cancel))
        try:
            resumes_at = session.resumes_at
            opened = training_pb2.TrainResponse(
                opened=training_pb2.SessionOpened(
                    spec=self._spec,
                    next=training_pb2.Position(
                        round=resumes_at.key.round, micro=resumes_at.key.micro
                    ),
                    course=resumes_at.course,
                    heartbeat_seconds=self._engine.heartbeat_seconds,
                    held=session.held,
                )
            )
            session.member.wire.add("down", "other", opened.ByteSize())
            yield opened
            async for response in session.answers():
                yield response
        finally:
            receiving.cancel()
            session.close(why_ended())

    async def _open(
        self,
        requests: AsyncIterator[training_pb2.TrainRequest],
        context: ServicerContext[training_pb2.TrainRequest, training_pb2.TrainResponse],
    ) -> Session:
        seconds = self._engine.stall_seconds
        try:
            request = await asyncio.wait_for(anext(requests, None), seconds)
        except asyncio.TimeoutError:
            raise OutOfOrder(f"open did not come within {seconds:g} s") from None
        if request is None or request.WhichOneof("message") != "open":
            raise OutOfOrder("the first message of a session must be open")
        check_acts_for_itself(context, request.open.client_id)
        check_opening(request.open, self._engine.run.spec)
        client_id, pauses = request.open.client_id, self._engine.pauses
        if pause_seconds := pauses.seconds(client_id):
            self._refusals.inc("sessions in vain")
            await asyncio.sleep(pause_seconds)
        try:
            return Session(self._engine, request.open)
        except LesftError:
            pauses.came_in_vain(client_id)
            raise
