"""The gRPC model service: tells what the run is, hands out the front's weights and the adapter."""

import asyncio
import zlib
from collections.abc import AsyncIterator

from grpc.aio import ServicerContext

from lesft.bundle import CHUNK_BYTES
from lesft.errors import HandshakeMismatch, InvalidInput
from lesft.spec import RunSpec
from lesft.spec_messages import spec_to_message
from lesft.v1 import model_pb2, model_pb2_grpc
from lesft.weights import FrontFile
from lesft_server.adapter_hand_out import AdapterHandOut
from lesft_server.handshake import check_protocol_version
from lesft_server.link_echo import echo
from lesft_server.planning import Planning

SERVICE_NAME = model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Keeper of the base weights, and of Φ once the run is finished."""

    def __init__(
        self,
        spec: RunSpec,
        config_json: str,
        front_file: FrontFile,
        adapter: AdapterHandOut,
        max_context: int,
        planning: Planning,
    ) -> None:
        """Reads the front once, for its size. Raises InvalidInput for a spec that cannot travel."""
        self._adapter = adapter
        self._planning = planning
        self._front_fingerprint = spec.front_fingerprint
        self._front_file = front_file
        self.front_bytes_sent = 0
        self._description = model_pb2.DescribeRunResponse(
            spec=spec_to_message(spec),
            config_json=config_json,
            front_bytes=front_file.size,
            max_context=max_context,
        )

    async def DescribeRun(
        self,
        request: model_pb2.DescribeRunRequest,
        context: ServicerContext[model_pb2.DescribeRunRequest, model_pb2.DescribeRunResponse],
    ) -> model_pb2.DescribeRunResponse:
        """See model.proto."""
        check_protocol_version(request.protocol_version)
        return self._description

    async def FetchFront(
        self,
        request: model_pb2.FetchFrontRequest,
        context: ServicerContext[model_pb2.FetchFrontRequest, model_pb2.FetchFrontResponse],
    ) -> AsyncIterator[model_pb2.FetchFrontResponse]:
        """See model.proto."""
        if request.front_fingerprint != self._front_fingerprint:
            raise HandshakeMismatch(
                f"front_fingerprint: server {self._front_fingerprint}, client "
                f"{request.front_fingerprint or 'none'}; ask for the run's description again"
            )
        if request.offset_bytes > self._front_file.size:
            raise InvalidInput(
                f"offset_bytes must be at most {self._front_file.size} (the file's size), got "
                f"{request.offset_bytes}: delete the cached file"
            )
        offset = request.offset_bytes
        while offset < self._front_file.size:
            data = await asyncio.to_thread(self._front_file.read, offset, CHUNK_BYTES)
            yield model_pb2.FetchFrontResponse(
                offset_bytes=offset, data=data, crc32=zlib.crc32(data)
            )
            offset += len(data)
            self.front_bytes_sent += len(data)

    async def FetchAdapter(
        self,
        request: model_pb2.FetchAdapterRequest,
        context: ServicerContext[model_pb2.FetchAdapterRequest, model_pb2.FetchAdapterResponse],
    ) -> AsyncIterator[model_pb2.FetchAdapterResponse]:
        """See model.proto."""
        for piece in await self._adapter.pieces(request):
            yield piece

    async def MeasureLink(
        self,
        request: AsyncIterator[model_pb2.MeasureLinkRequest],
        context: ServicerContext[model_pb2.MeasureLinkRequest, model_pb2.MeasureLinkResponse],
    ) -> AsyncIterator[model_pb2.MeasureLinkResponse]:
        """See model.proto."""
        async for answer in echo(request):
            yield answer

    async def MeasureBack(
        self,
        request: model_pb2.MeasureBackRequest,
        context: ServicerContext[model_pb2.MeasureBackRequest, model_pb2.MeasureBackResponse],
    ) -> model_pb2.MeasureBackResponse:
        """See model.proto."""
        return await self._planning.measure_back(request)

    async def ApplyPlan(
        self,
        request: model_pb2.ApplyPlanRequest,
        context: ServicerContext[model_pb2.ApplyPlanRequest, model_pb2.ApplyPlanResponse],
    ) -> model_pb2.ApplyPlanResponse:
        """See model.proto."""
        self._planning.apply(request)
        return model_pb2.ApplyPlanResponse()
