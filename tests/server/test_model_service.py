"""The keeper of the base weights over real gRPC: the run's description and the front's file."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc import StatusCode
from safetensors.torch import load, load_file

from lesft.bundle import CHUNK_BYTES
from lesft.errors import HandshakeMismatch, InvalidInput, LesftError, status_of
from lesft.spec import PROTOCOL_VERSION
from lesft.spec_messages import spec_from_message
from lesft.v1 import model_pb2, model_pb2_grpc
from tests.harness import RunningServer, running_server, save_tiny_model, server_settings
from tests.server.harness import Refusal, assert_serving, raw_channel, refusal_of

WIDE_VOCABULARY = 20_000
"""Makes the embedding larger than two chunks."""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("wide"), vocab_size=WIDE_VOCABULARY)


@pytest.fixture(scope="module")
def server(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    state = tmp_path_factory.mktemp("state")
    options: dict[str, Any] = {"cut_layer": 2, "loss": {"token_weights": "uniform"}}
    with running_server(server_settings(wide_model, state, **options)) as running:
        yield running


@pytest.fixture
def stub(server: RunningServer) -> Iterator[model_pb2_grpc.ModelServiceStub]:
    with raw_channel(server.grpc) as channel:
        yield model_pb2_grpc.ModelServiceStub(channel)


def describe(stub: model_pb2_grpc.ModelServiceStub) -> model_pb2.DescribeRunResponse:
    return stub.DescribeRun(model_pb2.DescribeRunRequest(protocol_version=PROTOCOL_VERSION))


def fetch(
    stub: model_pb2_grpc.ModelServiceStub, offset: int, fingerprint: str | None = None
) -> list[model_pb2.FetchFrontResponse]:
    if fingerprint is None:
        fingerprint = describe(stub).spec.front_fingerprint
    request = model_pb2.FetchFrontRequest(front_fingerprint=fingerprint, offset_bytes=offset)
    return list(stub.FetchFront(request))


def whole_front(stub: model_pb2_grpc.ModelServiceStub) -> bytes:
    return b"".join(piece.data for piece in fetch(stub, 0))


def refused(kind: type[LesftError], message: str) -> Refusal:
    return Refusal(status_of(kind("")).grpc, kind, message)


def test_the_description_is_the_runs(
    server: RunningServer, wide_model: Path, stub: model_pb2_grpc.ModelServiceStub
) -> None:
    description = describe(stub)
    assert spec_from_message(description.spec) == server.spec
    assert server.spec.loss.token_weights == "uniform"
    config = json.loads(description.config_json)
    assert config == json.loads((wide_model / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("llama", WIDE_VOCABULARY)
    assert description.front_bytes == len(whole_front(stub))


@pytest.mark.parametrize("version", [0, 1, PROTOCOL_VERSION + 1])
def test_another_protocol_version_is_refused(
    version: int, stub: model_pb2_grpc.ModelServiceStub
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.DescribeRun(model_pb2.DescribeRunRequest(protocol_version=version))
    assert refusal_of(caught.value) == refused(
        HandshakeMismatch,
        f"protocol_version: server {PROTOCOL_VERSION}, client {version}; install the same LESFT on "
        "both sides",
    )


def test_the_front_is_the_models_own_tensors_and_nothing_else(
    server: RunningServer, wide_model: Path, stub: model_pb2_grpc.ModelServiceStub
) -> None:
    tensors = load(whole_front(stub))
    whole = load_file(wide_model / "model.safetensors")
    expected = {
        name: tensor
        for name, tensor in whole.items()
        if name == "model.embed_tokens.weight"
        or name.startswith(("model.layers.0.", "model.layers.1."))
    }
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_every_piece_names_its_place_and_checksum_and_is_at_most_one_mebibyte(
    stub: model_pb2_grpc.ModelServiceStub,
) -> None:
    pieces = fetch(stub, 0)
    offset = 0
    for piece in pieces:
        assert piece.offset_bytes == offset
        assert piece.crc32 == zlib.crc32(piece.data)
        assert 0 < len(piece.data) <= CHUNK_BYTES
        offset += len(piece.data)
    assert max(len(piece.data) for piece in pieces) == CHUNK_BYTES
    assert offset == describe(stub).front_bytes


def test_a_download_goes_on_from_any_byte(stub: model_pb2_grpc.ModelServiceStub) -> None:
    front = whole_front(stub)
    header = 8 + int.from_bytes(front[:8], "little")
    borders = {0, 8, header, CHUNK_BYTES, header + CHUNK_BYTES, 2 * CHUNK_BYTES, len(front)}
    offsets = {border + step for border in borders for step in (-1, 0, 1)}
    for offset in sorted(o for o in offsets if 0 <= o <= len(front)):
        pieces = fetch(stub, offset)
        assert b"".join(piece.data for piece in pieces) == front[offset:], offset
        assert [piece.offset_bytes for piece in pieces[:1]] == [offset] * (offset < len(front))


@pytest.mark.parametrize("beyond", [1, 2**40])
def test_an_offset_beyond_the_end_is_refused(
    beyond: int, server: RunningServer, stub: model_pb2_grpc.ModelServiceStub
) -> None:
    size = describe(stub).front_bytes
    with pytest.raises(grpc.RpcError) as caught:
        fetch(stub, size + beyond)
    assert refusal_of(caught.value) == refused(
        InvalidInput,
        f"offset_bytes must be at most {size} (the file's size), got {size + beyond}: delete the "
        "cached file",
    )
    assert_serving(server)


@pytest.mark.parametrize(("asked", "shown"), [("sha256:0", "sha256:0"), ("", "none")])
def test_another_fingerprint_is_refused(
    asked: str, shown: str, server: RunningServer, stub: model_pb2_grpc.ModelServiceStub
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        fetch(stub, 0, asked)
    assert refusal_of(caught.value) == refused(
        HandshakeMismatch,
        f"front_fingerprint: server {server.spec.front_fingerprint}, client {shown}; ask for the "
        "run's description again",
    )


def test_what_is_no_protobuf_message_is_refused(server: RunningServer) -> None:
    with raw_channel(server.grpc) as channel:
        with pytest.raises(grpc.RpcError) as single:
            channel.unary_unary("/lesft.v1.ModelService/DescribeRun")(b"\xff", timeout=10)
        with pytest.raises(grpc.RpcError) as stream:
            list(channel.unary_stream("/lesft.v1.ModelService/FetchFront")(b"\xff", timeout=10))
    for caught in (single, stream):
        assert refusal_of(caught.value) == refused(
            InvalidInput,
            "a message of 1 bytes is not of this method's type: build the client from the same "
            ".proto files as this service",
        )
    assert_serving(server)


def test_a_compressed_message_that_unfolds_beyond_the_limit_is_refused(
    server: RunningServer,
) -> None:
    padding = bytes([0x7A, 0x80, 0x80, 0x80, 0x10]) + bytes(32 << 20)  # field 15 of 32 MiB
    with raw_channel(server.grpc) as channel:
        call = channel.unary_unary("/lesft.v1.ModelService/DescribeRun")
        with pytest.raises(grpc.RpcError) as caught:
            call(padding, compression=grpc.Compression.Gzip, timeout=20)
    assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
    assert_serving(server)


def test_a_spec_whose_numbers_do_not_fit_is_refused_before_anyone_is_served(
    wide_model: Path, tmp_path: Path
) -> None:
    settings = server_settings(wide_model, tmp_path, rounds=2**32)
    with (
        pytest.raises(InvalidInput, match=r"^the run spec does not fit into its message: .*rounds"),
        running_server(settings),
    ):
        pass
    assert not (tmp_path / "endpoints.json").exists()
