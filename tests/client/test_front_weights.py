"""The front's weights: fetched from a real server, cut, damaged, cached, or the folder's own."""

import itertools
import json
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from lesft.channel import open_channel
from lesft.errors import (
    BundleError,
    HandshakeMismatch,
    LesftError,
    ModelError,
    OutOfOrder,
    TooLarge,
    Unreachable,
)
from lesft.spec import PROTOCOL_VERSION
from lesft.v1 import model_pb2, model_pb2_grpc
from lesft.weights import Checkpoint, front_fingerprint
from lesft.wire import WireCounter
from lesft_client import patience
from lesft_client.front_weights import fetched_checkpoint, local_checkpoint
from lesft_client.train import TrainCommand
from tests import tiny_models
from tests.client.harness import running_aggregator, train_settings
from tests.harness import RunningServer, running_server, server_settings
from tests.processes.harness import make_samples, save_model_with_tokenizer, write_samples

Piece = model_pb2.FetchFrontResponse
Change = Callable[[int, Piece], Piece]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer_only(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    for file in model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    settings = server_settings(model, tmp_path_factory.mktemp("server"), cut_layer=2)
    with running_server(settings) as running:
        yield running


class CutOff(grpc.RpcError):
    """What gRPC raises when a connection breaks."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "connection reset"

    def trailing_metadata(self) -> tuple[()]:
        return ()


@dataclass
class Wire:
    """The real server's hand-out, with a fault in it; counts what went over it."""

    stub: model_pb2_grpc.ModelServiceStub
    offsets: list[int] = field(default_factory=list)
    num_bytes: int = 0
    cut_after: int | None = None
    """Pieces after which the connection breaks, once."""
    change: Change | None = None
    """What becomes of each piece, by its number."""
    extra: bytes = b""
    """What comes after the last piece."""

    def FetchFront(self, request: model_pb2.FetchFrontRequest) -> Iterator[Piece]:
        self.offsets.append(request.offset_bytes)
        end = request.offset_bytes
        for number, piece in enumerate(self.stub.FetchFront(request)):
            if number == self.cut_after:
                self.cut_after = None
                raise CutOff
            self.num_bytes += len(piece.data)
            end += len(piece.data)
            yield self.change(number, piece) if self.change else piece
        if self.extra:
            yield Piece(offset_bytes=end, data=self.extra, crc32=zlib.crc32(self.extra))


@dataclass
class Fetcher:
    """One client's cache and its way to the server."""

    wire: Wire
    description: model_pb2.DescribeRunResponse
    cache: Path
    patience_seconds: float = 60
    counter: WireCounter = field(default_factory=WireCounter)
    progress: list[int] = field(default_factory=list)

    def fetch(self, **faults: Any) -> Checkpoint:
        """Fetch the front over a wire with these faults."""
        for name, default in {"cut_after": None, "change": None, "extra": b""}.items():
            setattr(self.wire, name, faults.get(name, default))
        stub: Any = self.wire
        return fetched_checkpoint(
            stub,
            self.description,
            self.cache,
            "server s:1",
            patience_seconds=self.patience_seconds,
            wire=self.counter,
            progress=lambda done, total: self.progress.append(done),
        )

    @property
    def total(self) -> int:
        return self.description.front_bytes

    @property
    def folder(self) -> Path:
        """Where the front is kept; its name is the fingerprint's first digits."""
        digits = self.description.spec.front_fingerprint.removeprefix("sha256:")
        return self.cache / f"front-{digits[:32]}"

    @property
    def part(self) -> Path:
        return self.folder / "model.safetensors.part"

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"


@pytest.fixture
def fetcher(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fetcher]:
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.01)
    with open_channel(server.grpc) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        description = stub.DescribeRun(
            model_pb2.DescribeRunRequest(protocol_version=PROTOCOL_VERSION)
        )
        yield Fetcher(Wire(stub), description, tmp_path / "cache")


def assert_is_the_front(checkpoint: Checkpoint, model: Path) -> None:
    """Exactly the front's tensors, bit for bit, and the model's config."""
    whole = Checkpoint(model)
    names = whole.front_names(2)
    assert checkpoint.front_names(2) == names
    assert all(torch.equal(checkpoint.read(name), whole.read(name)) for name in names)
    assert "model.layers.2.mlp.up_proj.weight" not in checkpoint
    assert json.loads(checkpoint.config_json) == json.loads(whole.config_json)


# ---------------------------------------------------------------------- fetching


def test_a_client_with_only_a_tokenizer_trains_with_the_front_that_the_server_hands_out(
    model: Path, tokenizer_only: Path, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "data.jsonl", make_samples(6))

    def adapter(name: str, folder: Path) -> tuple[bytes, dict[str, Any]]:
        """Train one run from a model folder."""
        settings = server_settings(model, tmp_path / f"server-{name}", rounds=1, cut_layer=2)
        with (
            running_server(settings) as server,
            running_aggregator(tmp_path / f"aggregator-{name}") as aggregator,
        ):
            options = train_settings(
                server, aggregator, tmp_path / name, model=str(folder), data=str(data)
            )
            TrainCommand(options.model_copy(update={"cache": tmp_path / "cache"})).run()
        state = tmp_path / name / "state"
        result = json.loads((state / "result.json").read_text())
        return (state / "adapter.safetensors").read_bytes(), result["wire"]["down"]

    whole, down = adapter("whole", model)
    fetched, down_fetched = adapter("fetched", tokenizer_only)
    cached, down_cached = adapter("cached", tokenizer_only)
    assert whole == fetched == cached
    front_bytes = next((tmp_path / "cache").glob("*/model.safetensors")).stat().st_size
    assert down["other"] == down_cached["other"] < front_bytes
    assert down_fetched["other"] > down["other"] + front_bytes


def test_the_front_is_kept_and_a_second_fetch_transfers_nothing(
    fetcher: Fetcher, model: Path
) -> None:
    assert_is_the_front(fetcher.fetch(), model)
    assert fetcher.weights.stat().st_size == fetcher.total == fetcher.wire.num_bytes
    assert fetcher.progress[-1] == fetcher.total
    assert fetcher.progress == sorted(fetcher.progress)
    assert fetcher.counter.total("down") > fetcher.total
    assert not fetcher.part.exists()

    before = fetcher.counter.by_kind()
    assert_is_the_front(fetcher.fetch(), model)
    assert fetcher.wire.offsets == [0]
    assert fetcher.counter.by_kind() == before


def test_clients_of_one_machine_share_one_download(fetcher: Fetcher, model: Path) -> None:
    all_ready = threading.Barrier(3)

    def fetch() -> Checkpoint:
        all_ready.wait()
        return fetcher.fetch()

    with ThreadPoolExecutor(3) as pool:
        fetches = [pool.submit(fetch) for _ in range(3)]
        for done in fetches:
            assert_is_the_front(done.result(), model)
    assert fetcher.wire.offsets == [0]


# ---------------------------------------------------------------------- cut downloads


def test_a_cut_download_goes_on_where_it_ended(fetcher: Fetcher, model: Path) -> None:
    assert_is_the_front(fetcher.fetch(cut_after=3), model)
    first, second = fetcher.wire.offsets
    assert first == 0
    assert 0 < second < fetcher.total
    assert second in fetcher.progress
    assert fetcher.wire.num_bytes == fetcher.total


def test_another_start_of_the_client_goes_on_too(fetcher: Fetcher, model: Path) -> None:
    with pytest.raises(OutOfOrder):
        fetcher.fetch(change=lambda number, piece: Piece() if number == 4 else piece)
    kept = fetcher.part.stat().st_size
    assert 0 < kept < fetcher.total
    assert_is_the_front(fetcher.fetch(), model)
    assert fetcher.wire.offsets == [0, kept]


def test_a_server_that_stays_away_ends_it_with_its_name(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: model_pb2.FetchFrontRequest) -> Iterator[Piece]:
        raise CutOff

    monkeypatch.setattr(fetcher.wire, "FetchFront", refuse)
    monkeypatch.setattr(fetcher, "patience_seconds", 0.0)
    with pytest.raises(Unreachable, match=r"^server s:1: connection reset \(tried for 0 s"):
        fetcher.fetch()


def test_a_server_that_breaks_off_after_every_piece_gets_it_over_in_the_end(
    fetcher: Fetcher, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes: every piece is progress, and patience starts anew."""
    monkeypatch.setattr(patience, "_SHORTEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(fetcher, "patience_seconds", 0.001)
    whole_front = fetcher.wire.FetchFront

    def one_piece(request: model_pb2.FetchFrontRequest) -> Iterator[Piece]:
        yield from itertools.islice(whole_front(request), 1)
        raise CutOff

    monkeypatch.setattr(fetcher.wire, "FetchFront", one_piece)
    with pytest.raises(Unreachable):
        fetcher.fetch()
    assert fetcher.part.stat().st_size == fetcher.total == fetcher.wire.num_bytes
    assert len(fetcher.wire.offsets) > 10
    monkeypatch.undo()
    assert_is_the_front(fetcher.fetch(), model)


# ---------------------------------------------------------------------- what a server may not send


def damaged(number: int, piece: Piece) -> Piece:
    """The third piece with its first byte flipped on the way."""
    if number == 2:
        piece.data = bytes([piece.data[0] ^ 1]) + piece.data[1:]
    return piece


def shifted(number: int, piece: Piece) -> Piece:
    """The third piece one byte further than it is."""
    piece.offset_bytes += number == 2
    return piece


def shortened(number: int, piece: Piece) -> Piece:
    """The third piece without its end: a byte of the file is never sent."""
    if number == 2:
        return Piece(
            offset_bytes=piece.offset_bytes, data=piece.data[:-1], crc32=zlib.crc32(piece.data[:-1])
        )
    return piece


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        (
            {"change": damaged},
            BundleError,
            r"server s:1: the front's piece at byte \d+ was damaged on the way; start again to go "
            "on from there",
        ),
        (
            {"change": shifted},
            OutOfOrder,
            r"server s:1: byte \d+ of the front is due, got \d+",
        ),
        (
            {"change": shortened},
            OutOfOrder,
            r"server s:1: byte \d+ of the front is due, got \d+",
        ),
        (
            {"extra": b"and more"},
            TooLarge,
            r"server s:1: sent more than the front's \d+ bytes",
        ),
    ],
)
def test_a_piece_that_breaks_a_rule_is_refused_and_the_next_try_works(
    fetcher: Fetcher, model: Path, faults: Any, error: type[LesftError], message: str
) -> None:
    with pytest.raises(error) as caught:
        fetcher.fetch(**faults)
    assert re.fullmatch(message, str(caught.value))
    assert not fetcher.weights.exists()
    assert_is_the_front(fetcher.fetch(), model)


def test_nothing_of_a_damaged_piece_is_kept(fetcher: Fetcher, server: RunningServer) -> None:
    with pytest.raises(BundleError):
        fetcher.fetch(change=damaged)
    fetcher.fetch()
    assert fetcher.wire.offsets[1] == fetcher.progress[1]
    # The damaged piece and all after it were sent again, those before it were not.
    assert fetcher.total < fetcher.wire.num_bytes < fetcher.total * 2


def test_a_download_that_ends_too_early_is_refused_and_the_next_try_works(
    fetcher: Fetcher, model: Path
) -> None:
    fetcher.description.front_bytes += 8
    message = rf"server s:1: the front has {fetcher.total} bytes, but it sent {fetcher.total - 8}"
    with pytest.raises(BundleError, match=message):
        fetcher.fetch()
    fetcher.description.front_bytes -= 8
    assert_is_the_front(fetcher.fetch(), model)


# ---------------------------------------------------------------------- another front


def forged(number: int, piece: Piece) -> Piece:
    """The last byte of every piece flipped, under a checksum that fits."""
    data = piece.data[:-1] + bytes([piece.data[-1] ^ 1])
    return Piece(offset_bytes=piece.offset_bytes, data=data, crc32=zlib.crc32(data))


def headless(number: int, piece: Piece) -> Piece:
    """A file that is no safetensors file at all."""
    data = b"\xff" * len(piece.data)
    return Piece(offset_bytes=piece.offset_bytes, data=data, crc32=zlib.crc32(data))


def of_tensors(change: Change) -> Change:
    """The header, which comes first, is left as it is."""
    return lambda number, piece: change(number, piece) if number else piece


@pytest.mark.parametrize("change", [of_tensors(forged), headless])
def test_a_front_with_another_fingerprint_is_refused_and_deleted_and_the_next_try_works(
    fetcher: Fetcher, model: Path, change: Change
) -> None:
    fingerprint = fetcher.description.spec.front_fingerprint
    with pytest.raises(HandshakeMismatch) as caught:
        fetcher.fetch(change=change)
    message = str(caught.value)
    assert message.startswith(f"front_fingerprint: server {fingerprint}, fetched ")
    assert message.endswith("the copy in --cache was deleted, start again to fetch it anew")
    assert not fetcher.weights.exists()
    assert_is_the_front(fetcher.fetch(), model)


@pytest.mark.parametrize(
    "leftover", [lambda total: b"\0" * (total + 1), lambda total: b"\0" * (10 * total)]
)
def test_a_leftover_that_is_larger_than_the_front_is_thrown_away(
    fetcher: Fetcher, model: Path, leftover: Callable[[int], bytes]
) -> None:
    fetcher.folder.mkdir(parents=True)
    fetcher.part.write_bytes(leftover(fetcher.total))
    assert_is_the_front(fetcher.fetch(), model)
    assert fetcher.wire.offsets == [0]


def test_a_leftover_that_was_whole_needs_no_more_bytes(fetcher: Fetcher, model: Path) -> None:
    fetcher.fetch()
    fetcher.weights.rename(fetcher.part)
    assert_is_the_front(fetcher.fetch(), model)
    assert fetcher.wire.offsets == [0, fetcher.total]
    assert fetcher.wire.num_bytes == fetcher.total


@pytest.mark.parametrize("size", [1, 5000, None])
def test_a_leftover_of_other_bytes_costs_one_try(
    fetcher: Fetcher, model: Path, size: int | None
) -> None:
    fetcher.folder.mkdir(parents=True)
    fetcher.part.write_bytes(b"\x07" * (size or fetcher.total))
    with pytest.raises(HandshakeMismatch, match="start again to fetch it anew"):
        fetcher.fetch()
    assert_is_the_front(fetcher.fetch(), model)
    assert fetcher.wire.offsets[-1] == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"{}"])
def test_a_cached_front_that_was_damaged_on_disk_is_fetched_anew(
    fetcher: Fetcher, model: Path, name: str, content: bytes
) -> None:
    fetcher.fetch()
    (fetcher.folder / name).write_bytes(content)
    with pytest.raises(HandshakeMismatch, match="start again to fetch it anew"):
        fetcher.fetch()
    assert_is_the_front(fetcher.fetch(), model)


@pytest.mark.parametrize("name", ["/../../../.docker", "sha256:/../../models", "", "sha256:AB"])
def test_a_server_cannot_choose_where_it_is_written_to(fetcher: Fetcher, name: str) -> None:
    fetcher.description.spec.front_fingerprint = name
    with pytest.raises(HandshakeMismatch, match="must be sha256: and 64 hex digits, got"):
        fetcher.fetch()
    assert not fetcher.cache.exists()


# ---------------------------------------------------------------------- the folder's own weights


def test_weights_come_from_the_folder_where_it_has_any_unless_the_server_is_asked_for(
    model: Path, tokenizer_only: Path
) -> None:
    for weights in ("auto", "local"):
        checkpoint = local_checkpoint(str(model), weights)
        assert checkpoint is not None
        assert checkpoint.folder == model
    assert local_checkpoint(str(model), "server") is None
    assert local_checkpoint(str(tokenizer_only), "auto") is None
    assert local_checkpoint("owner/model-of-the-hub", "auto") is None


def test_local_weights_of_a_hub_id_are_the_hubs(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(repo: str, allow_patterns: list[str]) -> str:
        assert repo == "owner/model-of-the-hub"
        assert "*.safetensors" in allow_patterns
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    checkpoint = local_checkpoint("owner/model-of-the-hub", "local")
    assert checkpoint is not None
    assert checkpoint.folder == model


def test_local_weights_that_are_not_there_are_an_error(tokenizer_only: Path) -> None:
    with pytest.raises(ModelError) as caught:
        local_checkpoint(str(tokenizer_only), "local")
    assert str(caught.value) == (
        f"--weights local needs safetensors files in the folder --model {tokenizer_only}; leave it "
        "out to fetch the front from the server"
    )


def test_weights_that_are_not_the_servers_are_refused_when_the_session_opens(
    server: RunningServer, model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tiny_models.save_tiny_model(other, "llama", seed=1, vocab_size=300)
    data = write_samples(tmp_path / "data.jsonl", make_samples(6))
    with running_aggregator(tmp_path / "aggregator") as aggregator:
        settings = train_settings(server, aggregator, tmp_path, model=str(other), data=str(data))
        with pytest.raises(HandshakeMismatch) as caught:
            TrainCommand(settings).run()
    assert str(caught.value) == (
        f"server {server.grpc}: front_fingerprint: server {server.spec.front_fingerprint}, client "
        f"{front_fingerprint(Checkpoint(other), 2)}; the client's weights or config are not the "
        "server's; let it fetch them with --weights server"
    )
    assert server.engine.run.members == {}
