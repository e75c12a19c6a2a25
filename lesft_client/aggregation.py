"""The aggregation server as the client sees it: METHOD section 3, steps 8 and 10."""

from collections.abc import Iterator, Mapping

import grpc
import torch

from lesft.bundle import BundleReader, bundle_chunks, bundle_info
from lesft.errors import BundleError, LesftError, OutOfOrder
from lesft.interceptors import remote_errors
from lesft.spec import PROTOCOL_VERSION
from lesft.tensors import HEADER_BYTES, TensorSpec, decode_tensors, encode_tensors
from lesft.v1 import aggregation_pb2, aggregation_pb2_grpc
from lesft_client.patience import patiently
from lesft_client.wire import WireCounter


class Aggregator:
    """Hands in Θ_i and fetches Θ̄. Every call is safe to repeat and is, while nobody answers."""

    def __init__(
        self,
        channel: grpc.Channel,
        party: str,
        client_id: str,
        run_id: str,
        num_samples: int,
        patience_seconds: float,
        wire: WireCounter,
    ) -> None:
        self._stub = aggregation_pb2_grpc.AggregationServiceStub(channel)
        self._party = party
        self._client_id = client_id
        self._run_id = run_id
        self._num_samples = num_samples
        self._patience_seconds = patience_seconds
        self._wire = wire
        self._fetching: grpc.Call | None = None
        self._run_end: LesftError | None = None

    def join(self) -> int:
        """Introduce this client; returns the newest version. Raises what it is refused with."""
        request = aggregation_pb2.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            client_id=self._client_id,
            run_id=self._run_id,
            num_samples=self._num_samples,
        )

        def call() -> aggregation_pb2.JoinResponse:
            with remote_errors(self._party):
                return self._stub.Join(request)

        response = patiently(call, self._patience_seconds)
        self._wire.add("up", "other", request.ByteSize())
        self._wire.add("down", "other", response.ByteSize())
        return response.version

    def submit(self, base_version: int, state: Mapping[str, torch.Tensor]) -> None:
        """Step 8: hand in this client's adapter, trained from `base_version`."""
        data = encode_tensors(state, "raw")
        submission = aggregation_pb2.Submission(
            client_id=self._client_id,
            run_id=self._run_id,
            base_version=base_version,
            num_samples=self._num_samples,
            bundle=bundle_info(data),
        )

        def messages() -> Iterator[aggregation_pb2.SubmitRequest]:
            yield self._sent(aggregation_pb2.SubmitRequest(submission=submission))
            for chunk in bundle_chunks(data):
                yield self._sent(aggregation_pb2.SubmitRequest(chunk=chunk))

        def call() -> aggregation_pb2.SubmitResponse:
            with remote_errors(self._party):
                return self._stub.Submit(messages())

        response = patiently(call, self._patience_seconds)
        self._wire.add("down", "other", response.ByteSize())

    def _sent(self, message: aggregation_pb2.SubmitRequest) -> aggregation_pb2.SubmitRequest:
        self._wire.add("up", "adapters", message.ByteSize())
        return message

    def fetch(self, version: int, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Step 10: wait for a version of Θ̄, which must have the names and shapes of `like`."""
        request = aggregation_pb2.FetchRequest(
            client_id=self._client_id, run_id=self._run_id, version=version
        )
        expected = {
            name: TensorSpec(tuple(tensor.shape), (torch.float32,)) for name, tensor in like.items()
        }
        max_bytes = sum(t.numel() * 4 for t in like.values()) + HEADER_BYTES + 256 * len(like)

        def call() -> bytes:
            self._wire.add("up", "other", request.ByteSize())
            responses = self._fetching = self._stub.Fetch(request)
            if self._run_end is not None:
                responses.cancel()
            with remote_errors(self._party):
                return self._read(responses, version, max_bytes)

        data = patiently(call, self._patience_seconds, self._raise_run_end)
        return decode_tensors(data, expected)

    def end(self, error: LesftError) -> None:
        """The run is over: a version that is waited for will not come. `fetch` raises `error`.

        Called from another thread than `fetch`.
        """
        self._run_end = error
        if self._fetching is not None:
            self._fetching.cancel()

    def _raise_run_end(self) -> None:
        if self._run_end is not None:
            raise self._run_end

    def _read(
        self, responses: Iterator[aggregation_pb2.FetchResponse], version: int, max_bytes: int
    ) -> bytes:
        header = next(responses, aggregation_pb2.FetchResponse())
        if header.WhichOneof("message") != "aggregate" or header.aggregate.version != version:
            raise OutOfOrder(f"{self._party}: did not answer with version {version}")
        self._wire.add("down", "adapters", header.ByteSize())
        reader = BundleReader(header.aggregate.bundle, max_bytes)
        for response in responses:
            if response.WhichOneof("message") != "chunk":
                raise BundleError(f"{self._party}: chunk {reader.next_index} is missing")
            self._wire.add("down", "adapters", response.ByteSize())
            reader.add(response.chunk)
        return reader.data()
