"""The aggregation server as the client sees it: METHOD section 3, steps 8 and 10."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import grpc
import torch

from lesft.adapter_codec import FloatArray, checksum, decode, decoded_bytes, encode
from lesft.bundle import BundleReader, bundle_chunks, bundle_info
from lesft.errors import BundleError, OutOfOrder, Unreachable, one_line
from lesft.interceptors import remote_errors
from lesft.spec import PROTOCOL_VERSION, AdapterEncoding
from lesft.spec_messages import adapter_encoding, adapter_encoding_to_message
from lesft.tensors import (
    HEADER_BYTES,
    TensorSpec,
    check_tensors,
    decode_tensors,
    encode_tensors,
)
from lesft.v1 import aggregation_pb2, aggregation_pb2_grpc, receipt_pb2
from lesft.wire import WireCounter
from lesft_client.link import Patience
from lesft_client.patience import patiently
from lesft_client.trainer import BEGINNING, Average
from lesft_client.watchdog import Watchdog

T = TypeVar("T")


class Aggregator:
    """Hands in Θ_i and fetches Θ̄. Every call is safe to repeat and is, while nobody answers.

    A connection over which nothing was heard for too long is given up for a new one.
    """

    def __init__(
        self,
        connect: Callable[[], grpc.Channel],
        party: str,
        client_id: str,
        run_id: str,
        run_fingerprint: str,
        num_samples: int,
        encoding: AdapterEncoding,
        patience: Patience,
        wire: WireCounter,
        still_wanted: Callable[[], None] = lambda: None,
        on_waiting: Callable[[str], None] = lambda waiting_for: None,
    ) -> None:
        """`still_wanted` raises when nothing would come of waiting on.

        `on_waiting` hears what the aggregator waits for, in words.
        """
        self._connect = connect
        self._party = party
        self._client_id = client_id
        self._run_id = run_id
        self._run_fingerprint = run_fingerprint
        self._num_samples = num_samples
        self._encoding: AdapterEncoding = encoding
        self._patience = patience
        self._wire = wire
        self._still_wanted = still_wanted
        self._on_waiting = on_waiting
        self._channel: grpc.Channel | None = None
        self._fetching: grpc.Call | None = None
        self._stall_seconds = patience.stall
        self._heard = 0

    def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def join(self) -> int:
        """Introduce this client; returns the newest version. Raises what it is refused with."""
        request = aggregation_pb2.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            client_id=self._client_id,
            run_id=self._run_id,
            num_samples=self._num_samples,
            run_fingerprint=self._run_fingerprint,
        )

        def call() -> aggregation_pb2.JoinResponse:
            with self._watched():
                return self._stub().Join(request)

        response = patiently(call, self._patience.first_contact)
        # An aggregator whose heartbeats are rarer than our patience is not to be taken for dead.
        self._stall_seconds = max(self._patience.stall, 3 * response.heartbeat_seconds)
        self._wire.add("up", "other", request.ByteSize())
        self._wire.add("down", "other", response.ByteSize())
        return response.version

    def submit(
        self, base: Average, state: Mapping[str, torch.Tensor], receipt: bytes = b""
    ) -> None:
        """Step 8: hand in this client's adapter, trained from `base`."""
        ours = _arrays(base.tensors)
        if self._encoding == "raw":
            data = encode_tensors(state, "raw")
        else:
            data = encode(_arrays(state), self._encoding, ours)
        submission = aggregation_pb2.Submission(
            client_id=self._client_id,
            run_id=self._run_id,
            base_version=base.version,
            num_samples=self._num_samples,
            bundle=bundle_info(data),
            encoding=adapter_encoding_to_message(self._encoding),
            base_crc32=checksum(ours),
            receipt=receipt_pb2.Receipt.FromString(receipt) if receipt else None,
        )

        def messages(watchdog: Watchdog) -> Iterator[aggregation_pb2.SubmitRequest]:
            chunks = (aggregation_pb2.SubmitRequest(chunk=chunk) for chunk in bundle_chunks(data))
            for message in (aggregation_pb2.SubmitRequest(submission=submission), *chunks):
                self._wire.add("up", "adapters", message.ByteSize())
                watchdog.feed()  # what came before it is on its way
                yield message

        def call() -> aggregation_pb2.SubmitResponse:
            with self._watched() as watchdog:
                return self._stub().Submit(messages(watchdog))

        response = self._again_and_again(call)
        self._wire.add("down", "other", response.ByteSize())

    def fetch(
        self, version: int, like: Mapping[str, torch.Tensor], base: Average = BEGINNING
    ) -> dict[str, torch.Tensor]:
        """Step 10: wait for a version of Θ̄, which must have the names and shapes of `like`."""
        ours = _arrays(base.tensors)
        request = aggregation_pb2.FetchRequest(
            client_id=self._client_id,
            run_id=self._run_id,
            version=version,
            held_version=base.version if ours else 0,
            held_crc32=checksum(ours),
        )
        expected = {
            name: TensorSpec(tuple(tensor.shape), (torch.float32,)) for name, tensor in like.items()
        }
        max_bytes = sum(t.numel() * 4 for t in like.values()) + HEADER_BYTES + 256 * len(like)

        def call() -> tuple[bytes, AdapterEncoding]:
            self._wire.add("up", "other", request.ByteSize())
            with self._watched() as watchdog:
                responses = self._fetching = self._stub().Fetch(request)
                try:
                    self._still_wanted()
                    return self._read(responses, version, max_bytes, watchdog)
                finally:
                    responses.cancel()  # does nothing to one that has ended

        try:
            data, encoding = self._again_and_again(call)
        finally:
            self._on_waiting("")
        if encoding == "raw":
            return decode_tensors(data, expected)
        arrays = decode(data, encoding, ours, decoded_bytes(_arrays(like)))
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        check_tensors(tensors, expected)
        return tensors

    def interrupt(self) -> None:
        """`still_wanted` has come to raise: let `fetch` ask it. Called from another thread."""
        fetching = self._fetching
        if fetching is not None:
            fetching.cancel()

    # ------------------------------------------------------------------ its pieces

    def _stub(self) -> aggregation_pb2_grpc.AggregationServiceStub:
        if self._channel is None:
            self._channel = self._connect()
        return aggregation_pb2_grpc.AggregationServiceStub(self._channel)

    def _again_and_again(self, call: Callable[[], T]) -> T:
        return patiently(
            call,
            self._patience.reconnect,
            self._still_wanted,
            progress=lambda: self._heard,
            option="--reconnect-seconds",
        )

    @contextmanager
    def _watched(self) -> Iterator[Watchdog]:
        """Errors of our tree; and the connection is given up when nothing is heard over it."""
        with Watchdog(self._stall_seconds, self.close) as watchdog:
            try:
                with remote_errors(self._party):
                    yield watchdog
            except (Unreachable, ValueError) as error:
                # The next try connects anew, with the certificate that is good by then. gRPC raises
                # ValueError for a call on a channel that was closed meanwhile.
                self.close()
                if watchdog.bitten:
                    raise Unreachable(
                        f"{self._party}: nothing was heard of it for {watchdog.seconds:g} s"
                    ) from None
                raise error

    def _read(
        self,
        responses: Iterator[aggregation_pb2.FetchResponse],
        version: int,
        max_bytes: int,
        watchdog: Watchdog,
    ) -> tuple[bytes, AdapterEncoding]:
        reader: BundleReader | None = None
        encoding: AdapterEncoding = "raw"
        for response in responses:
            watchdog.feed()
            kind = response.WhichOneof("message")
            if kind == "heartbeat" and reader is None:
                self._wire.add("down", "other", response.ByteSize())
                self._on_waiting(one_line(response.heartbeat.waiting_for))
                continue
            self._heard += 1
            self._wire.add("down", "adapters", response.ByteSize())
            if reader is None:
                if kind != "aggregate" or response.aggregate.version != version:
                    raise OutOfOrder(f"{self._party}: did not answer with version {version}")
                reader = BundleReader(response.aggregate.bundle, max_bytes)
                encoding = adapter_encoding(response.aggregate.encoding)
            elif kind != "chunk":
                raise BundleError(f"{self._party}: chunk {reader.next_index} is missing")
            else:
                reader.add(response.chunk)
        if reader is None:
            raise OutOfOrder(f"{self._party}: did not answer with version {version}")
        return reader.data(), encoding


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, FloatArray]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
