"""Φ from the server: the back's half of the adapter, checked against the front's."""

from collections.abc import Iterator

from lesft.adapter_halves import AdapterHalf, back_tensor_specs
from lesft.bundle import BundleReader
from lesft.errors import BundleError, HandshakeMismatch
from lesft.interceptors import remote_errors
from lesft.spec import PROTOCOL_VERSION
from lesft.tensors import HEADER_BYTES, decode_tensors
from lesft.v1 import model_pb2, model_pb2_grpc
from lesft_client.connector import Connector
from lesft_client.patience import patiently

MAX_LAYERS = 1024
"""More than any model has; bounds what a server can make us hold."""

_NAME_BYTES = 256
"""Room for a tensor's entry in its bundle's header."""


def fetch_back(connector: Connector, patience_seconds: float, front: AdapterHalf) -> AdapterHalf:
    """The half that belongs to `front`.

    Raises NotAllowed or OutOfOrder when the server does not hand it out, or not yet,
    HandshakeMismatch when it has another one, BundleError or TooLarge for one that cannot be right.
    """
    party = f"server {connector.address}"
    request = model_pb2.FetchAdapterRequest(
        protocol_version=PROTOCOL_VERSION,
        spec_fingerprint=front.info.spec_fingerprint,
        rounds=front.info.rounds,
    )
    with connector.open() as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)

        def call() -> AdapterHalf:
            with remote_errors(party):
                return read_back(stub.FetchAdapter(request), front)

        return patiently(call, patience_seconds)


def read_back(
    responses: Iterator[model_pb2.FetchAdapterResponse], front: AdapterHalf
) -> AdapterHalf:
    """The half of a call's responses. Raises as `fetch_back` does."""
    first = next(iter(responses), None)
    if first is None or first.WhichOneof("piece") != "header":
        raise BundleError("the server's half of the adapter must begin with its header")
    header = first.header
    for name in ("run_id", "cut_layer", "rounds", "spec_fingerprint"):
        theirs, ours = getattr(header, name), getattr(front.info, name)
        if theirs != ours:
            raise HandshakeMismatch(
                f"{name}: server {theirs}, client {ours}; ask the server that the client trained "
                "with"
            )
    info = front.info.model_copy(update={"side": "back"})
    if not info.cut_layer < header.num_layers <= MAX_LAYERS:
        raise BundleError(
            f"num_layers must lie between {info.cut_layer + 1} and {MAX_LAYERS}, got "
            f"{header.num_layers}"
        )
    expected = back_tensor_specs(front, header.num_layers)
    room = HEADER_BYTES + sum(_NAME_BYTES + 4 * spec.num_values for spec in expected.values())
    reader = BundleReader(header.bundle, room)
    for response in responses:
        if response.WhichOneof("piece") != "chunk":
            raise BundleError("a chunk of the adapter was due, got another message")
        reader.add(response.chunk)
    return AdapterHalf(info, decode_tensors(reader.data(), expected))
