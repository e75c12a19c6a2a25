"""The aggregation service over gRPC: handlers check, call and return; `rounds` has the rules."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from lesft.bundle import CHUNK_BYTES, BundleReader
from lesft.errors import Busy, LesftError, OutOfOrder, TooLarge, Unreachable
from lesft.identity.attestation import Verifier
from lesft.identity.caller import check_acts_for_itself
from lesft.intake import Intake
from lesft.logs import note
from lesft.spec_messages import adapter_encoding, adapter_encoding_to_message
from lesft.tracing import span
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.aggregation_pb2_grpc import AggregationServiceServicer
from lesft.v1.heartbeat_pb2 import Heartbeat
from lesft.v1.receipt_pb2 import Statement
from lesft.v1.tensor_pb2 import BundleInfo, Chunk
from lesft_aggregator.adapters import most_bytes
from lesft_aggregator.admission import Introduction, check_name
from lesft_aggregator.metrics import Metrics
from lesft_aggregator.receipts import check_receipt
from lesft_aggregator.rounds import Receipt, Rounds
from lesft_aggregator.settings import AggregatorSettings
from lesft_aggregator.store import Store
from lesft_aggregator.tables import Adapter

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["AggregationService"].full_name

MAX_SUBMISSIONS_PER_CLIENT = 8
"""Submissions of one client under way: others than the first while its connection is found broken.
The bytes of those that wait for room lie in gRPC's windows, of some MiB each."""

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
        self._verifier = Verifier(settings.server_key) if settings.server_key else None
        self._limit_bytes = settings.max_submission_mib << 20
        self._intake = Intake(self._limit_bytes, "--max-submission-mib")
        metrics.watch_intake(self._intake)
        self._submitting: Counter[str] = Counter()

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """Takes a client in."""
        check_acts_for_itself(context, request.client_id)
        client = Introduction(request.client_id, request.run_id, request.num_samples)
        # A client's word on what the run is does not count before the server's is there.
        settled = self._verifier is None or self._rounds.run_fingerprint
        fingerprint = request.run_fingerprint if settled else ""
        version = await self._rounds.join(request.protocol_version, client, fingerprint)
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
            receipt = await self._submit(requests, context)
        except LesftError as error:
            self._metrics.submissions.labels(type(error).__name__).inc()
            raise
        self._metrics.submissions.labels("repeated" if receipt.repeated else "accepted").inc()
        return pb.SubmitResponse(version=receipt.version, received=receipt.received)

    async def _submit(self, requests: AsyncIterator[pb.SubmitRequest], context: Context) -> Receipt:
        header = await self._header(requests)
        check_acts_for_itself(context, header.client_id)
        vouched: Statement | None = None
        if self._verifier is not None:
            vouched = check_receipt(self._verifier, header, self._rounds.run_fingerprint)
        client = Introduction(header.client_id, header.run_id, header.num_samples)
        self._rounds.check(client, header.base_version)
        note(client=header.client_id, version=header.base_version + 1)
        self._check_size(header.bundle.total_bytes)
        encoding = adapter_encoding(header.encoding)
        version = header.base_version
        traced = span(
            "submission", header.run_id, version, client=header.client_id, base_version=version
        )
        with self._one_more_of(header.client_id), traced:
            async with self._intake.room(header.bundle.total_bytes):
                data = await self._receive(header.client_id, header.bundle, requests)
                receipt = await self._rounds.submit(
                    client,
                    header.base_version,
                    data,
                    encoding,
                    header.base_crc32,
                    vouched and vouched.run_instance,
                )
        if vouched is not None:
            self._rounds.run_fingerprint = vouched.run_fingerprint
        return receipt

    @contextmanager
    def _one_more_of(self, client_id: str) -> Iterator[None]:
        """One submission of a client as long as the block lasts. Raises Busy."""
        if self._submitting[client_id] == MAX_SUBMISSIONS_PER_CLIENT:
            self._metrics.limits.inc("submissions of one client")
            raise Busy(
                f"{MAX_SUBMISSIONS_PER_CLIENT} submissions of client {client_id!r} are under way "
                "already: try again in a while"
            )
        self._submitting[client_id] += 1
        try:
            yield
        finally:
            self._submitting[client_id] -= 1
            if not self._submitting[client_id]:
                del self._submitting[client_id]

    def _check_size(self, num_bytes: int) -> None:
        """Before any room is held for it. Raises TooLarge."""
        if num_bytes > self._limit_bytes:
            raise TooLarge(
                f"adapter of {num_bytes} bytes announced, but at most {self._limit_bytes} are "
                "accepted: lower the LoRA rank, or restart the aggregator with a larger "
                "--max-submission-mib"
            )
        layout = self._store.layout()
        if layout is not None and num_bytes > (most := most_bytes(layout)):
            raise TooLarge(
                f"adapter of {num_bytes} bytes announced, but those of this run have at most "
                f"{most}: all clients must train the same layers with the same LoRA"
            )

    async def _receive(
        self, client_id: str, bundle: BundleInfo, requests: AsyncIterator[pb.SubmitRequest]
    ) -> bytes:
        received = self._metrics.received_bytes.labels(self._label(client_id))
        reader = BundleReader(bundle, self._limit_bytes)
        while (request := await self._next(requests)) is not None:
            if request.WhichOneof("message") != "chunk":
                raise OutOfOrder("after the submission only chunks may follow")
            received.inc(len(request.chunk.data))
            reader.add(request.chunk)
        # The checksum of a large bundle takes a while: not on the event loop.
        return await asyncio.to_thread(reader.data)

    def _label(self, client_id: str) -> str:
        """Names that strangers make up must not become labels, which are kept for ever."""
        known = any(client.client_id == client_id for client in self._store.clients())
        return client_id if known else ""

    async def Fetch(
        self, request: pb.FetchRequest, context: Context
    ) -> AsyncIterator[pb.FetchResponse]:
        """Waits for a version, with heartbeats, and sends it from disk, chunk by chunk."""
        check_acts_for_itself(context, request.client_id)
        check_name(request.client_id, request.run_id, self._settings.run_id)
        waiting = asyncio.create_task(self._rounds.wait_for_version(request.version))
        try:
            while not (await asyncio.wait([waiting], timeout=self._settings.heartbeat_seconds))[0]:
                waiting_for = self._rounds.waiting_for()
                yield pb.FetchResponse(heartbeat=Heartbeat(waiting_for=waiting_for))
            adapter = waiting.result()
        finally:
            waiting.cancel()
        sent = self._metrics.sent_bytes.labels(self._label(request.client_id))
        for response in self._answer(adapter, request):
            yield response
            sent.inc(len(response.chunk.data))

    def _answer(self, adapter: Adapter, request: pb.FetchRequest) -> Iterator[pb.FetchResponse]:
        """A version as the client can make use of it: what has changed, or all of it."""
        encoding, path = adapter.encoding, self._store.encoded_path(adapter.version)
        bundle = BundleInfo(total_bytes=adapter.encoded_bytes, crc32=adapter.encoded_crc32)
        if encoding == "raw" or not self._has_the_one_before(request, adapter.version):
            encoding, path = "raw", self._store.adapter_path(adapter.version)
            bundle = BundleInfo(total_bytes=adapter.num_bytes, crc32=adapter.crc32)
        aggregate = pb.Aggregate(
            version=adapter.version,
            client_ids=adapter.client_ids,
            num_samples=adapter.num_samples,
            bundle=bundle,
            encoding=adapter_encoding_to_message(encoding),
        )
        yield pb.FetchResponse(aggregate=aggregate)
        with path.open("rb") as file:
            for index, start in enumerate(range(0, bundle.total_bytes, CHUNK_BYTES)):
                data = file.read(min(CHUNK_BYTES, bundle.total_bytes - start))
                yield pb.FetchResponse(chunk=Chunk(index=index, data=data))

    def _has_the_one_before(self, request: pb.FetchRequest, version: int) -> bool:
        before = self._store.adapter(version - 1)
        crc32 = 0 if before is None else before.values_crc32
        return (request.held_version, request.held_crc32) == (version - 1, crc32)

    async def _header(self, requests: AsyncIterator[pb.SubmitRequest]) -> pb.Submission:
        request = await self._next(requests)
        if request is None or request.WhichOneof("message") != "submission":
            raise OutOfOrder("a submission's first message must be its header, then its chunks")
        return request.submission

    async def _next(self, requests: AsyncIterator[pb.SubmitRequest]) -> pb.SubmitRequest | None:
        """The client's next message; None after its last. Raises Unreachable when it stalls."""
        seconds = self._settings.stall_seconds
        try:
            return await asyncio.wait_for(anext(requests), seconds)
        except StopAsyncIteration:
            return None
        except asyncio.TimeoutError:
            raise Unreachable(
                f"nothing came for {seconds:g} s in mid-submission: submit again"
            ) from None
