"""The aggregation service over gRPC: handlers check, call and return; `rounds` has the rules."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from lesft.bundle import CHUNK_BYTES, BundleReader
from lesft.errors import LesftError, OutOfOrder, TooLarge, Unreachable
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.aggregation_pb2_grpc import AggregationServiceServicer
from lesft.v1.heartbeat_pb2 import Heartbeat
from lesft.v1.tensor_pb2 import BundleInfo, Chunk
from lesft_aggregator.admission import Introduction, check_name
from lesft_aggregator.intake import Intake
from lesft_aggregator.metrics import Metrics
from lesft_aggregator.rounds import Receipt, Rounds
from lesft_aggregator.settings import AggregatorSettings
from lesft_aggregator.store import Store

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["AggregationService"].full_name

PROGRESS_SECONDS = 300
"""A client that stalls for longer loses its room to the others. One chunk may take its time."""

Context = grpc.aio.ServicerContext[Any, Any]


class AggregationService(AggregationServiceServicer):
    """Errors of our tree become statuses in `lesft.interceptors`."""

    def __init__(
        self, rounds: Rounds, store: Store, settings: AggregatorSettings, metrics: Metrics
    ) -> None:
        self._rounds = rounds
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._limit_bytes = settings.max_submission_mib << 20
        self._intake = Intake(self._limit_bytes)

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """Takes a client in."""
        client = Introduction(request.client_id, request.run_id, request.num_samples)
        version = await self._rounds.join(request.protocol_version, client, request.run_fingerprint)
        return pb.JoinResponse(
            version=version,
            clients=self._settings.clients,
            heartbeat_seconds=self._settings.heartbeat_seconds,
        )

    async def Submit(
        self, requests: AsyncIterator[pb.SubmitRequest], context: Context
    ) -> pb.SubmitResponse:
        """Takes one client's adapter."""
        try:
            receipt = await self._submit(requests)
        except LesftError as error:
            self._metrics.submissions.labels(type(error).__name__).inc()
            raise
        self._metrics.submissions.labels("repeated" if receipt.repeated else "accepted").inc()
        return pb.SubmitResponse(version=receipt.version, received=receipt.received)

    async def _submit(self, requests: AsyncIterator[pb.SubmitRequest]) -> Receipt:
        header = await _header(requests)
        client = Introduction(header.client_id, header.run_id, header.num_samples)
        self._rounds.check(client, header.base_version)
        if header.bundle.total_bytes > self._limit_bytes:
            raise TooLarge(
                f"adapter of {header.bundle.total_bytes} bytes announced, but at most "
                f"{self._limit_bytes} are accepted: lower the LoRA rank, or restart the "
                "aggregator with a larger --max-submission-mib"
            )
        async with self._intake.room(header.bundle.total_bytes):
            data = await self._receive(header.bundle, requests)
            return await self._rounds.submit(client, header.base_version, data)

    async def _receive(
        self, bundle: BundleInfo, requests: AsyncIterator[pb.SubmitRequest]
    ) -> bytes:
        reader = BundleReader(bundle, self._limit_bytes)
        while (request := await _next(requests)) is not None:
            if request.WhichOneof("message") != "chunk":
                raise OutOfOrder("after the submission only chunks may follow")
            self._metrics.received_bytes.inc(len(request.chunk.data))
            reader.add(request.chunk)
        # The checksum of a large bundle takes a while: not on the event loop.
        return await asyncio.to_thread(reader.data)

    async def Fetch(
        self, request: pb.FetchRequest, context: Context
    ) -> AsyncIterator[pb.FetchResponse]:
        """Waits for a version, with heartbeats, and sends it from disk, chunk by chunk."""
        check_name(request.client_id, request.run_id, self._settings.run_id)
        waiting = asyncio.create_task(self._rounds.wait_for_version(request.version))
        try:
            while not (await asyncio.wait([waiting], timeout=self._settings.heartbeat_seconds))[0]:
                missing = ", ".join(self._rounds.missing())
                waiting_for = f"the adapters of {missing}" if missing else "the averaging"
                waiting_for = self._rounds.obstacle or waiting_for
                yield pb.FetchResponse(heartbeat=Heartbeat(waiting_for=waiting_for))
            adapter = waiting.result()
        finally:
            waiting.cancel()
        bundle = BundleInfo(total_bytes=adapter.num_bytes, crc32=adapter.crc32)
        yield pb.FetchResponse(
            aggregate=pb.Aggregate(
                version=adapter.version,
                client_ids=adapter.client_ids,
                num_samples=adapter.num_samples,
                bundle=bundle,
            )
        )
        with self._store.adapter_path(adapter.version).open("rb") as file:
            for index, start in enumerate(range(0, adapter.num_bytes, CHUNK_BYTES)):
                data = file.read(min(CHUNK_BYTES, adapter.num_bytes - start))
                self._metrics.sent_bytes.inc(len(data))
                yield pb.FetchResponse(chunk=Chunk(index=index, data=data))


async def _header(requests: AsyncIterator[pb.SubmitRequest]) -> pb.Submission:
    request = await _next(requests)
    if request is None or request.WhichOneof("message") != "submission":
        raise OutOfOrder("a submission's first message must be its header, then its chunks")
    return request.submission


async def _next(requests: AsyncIterator[pb.SubmitRequest]) -> pb.SubmitRequest | None:
    """The client's next message; None after its last. Raises Unreachable when it stalls."""
    try:
        return await asyncio.wait_for(anext(requests), PROGRESS_SECONDS)
    except StopAsyncIteration:
        return None
    except asyncio.TimeoutError:
        raise Unreachable(
            f"nothing came for {PROGRESS_SECONDS} s in mid-submission: submit again"
        ) from None
