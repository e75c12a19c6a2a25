"""The gRPC training service: opens sessions and passes messages; no mathematics here."""

import asyncio
from collections.abc import AsyncIterator

from grpc.aio import ServicerContext

from lesft.errors import OutOfOrder
from lesft.spec_messages import spec_to_message
from lesft.v1 import training_pb2, training_pb2_grpc
from lesft_server.handshake import check_opening
from lesft_server.session import Engine, Session

SERVICE_NAME = training_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """One bidirectional stream per client."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Train(
        self,
        request_iterator: AsyncIterator[training_pb2.TrainRequest],
        context: ServicerContext[training_pb2.TrainRequest, training_pb2.TrainResponse],
    ) -> AsyncIterator[training_pb2.TrainResponse]:
        """See training.proto."""
        requests = aiter(request_iterator)
        session = self._open(await anext(requests, None))
        receiving = asyncio.create_task(session.receive(requests))
        try:
            yield training_pb2.TrainResponse(
                opened=training_pb2.SessionOpened(
                    spec=spec_to_message(self._engine.run.spec),
                    next_round=session.member.next_key.round,
                )
            )
            async for response in session.answers():
                yield response
        finally:
            receiving.cancel()
            session.close()

    def _open(self, request: training_pb2.TrainRequest | None) -> Session:
        if request is None or request.WhichOneof("message") != "open":
            raise OutOfOrder("the first message of a session must be open")
        check_opening(request.open, self._engine.run.spec)
        return Session(self._engine, request.open.client_id, request.open.num_samples)
