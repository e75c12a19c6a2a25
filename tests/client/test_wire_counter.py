"""What the client says of its traffic is what really crosses the wire."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import lesft_client.connector
from lesft.channel import open_channel
from lesft.quantization import QUANTIZED
from lesft.spec import Encoding, LossSpec
from lesft.wire import WireCounter
from lesft_client.data import EncodedSample, encode_samples, sample_index
from lesft_client.data_command import samples_of
from lesft_client.train import TrainCommand
from lesft_client.train_settings import TrainSettings
from tests.client.harness import CountingChannel, running_aggregator, train_settings
from tests.harness import running_server, server_settings
from tests.processes.harness import make_samples, save_model_with_tokenizer, write_samples
from tests.tiny_models import HIDDEN_SIZE

ROUNDS, ACCUMULATION, BATCH_SIZE = 3, 2, 2
SCALE_BYTES = 2  # of one row: its width is one block
DEFLATE_BYTES = 10  # at most, beyond what a few codes would take as they are


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("encoding", "bytes_per_token", "reference_nll_weight"),
    [
        ("raw", 4 * HIDDEN_SIZE, 0.0),
        ("bf16", 2 * HIDDEN_SIZE, 0.1),
        ("int8", HIDDEN_SIZE + SCALE_BYTES, 0.1),
        ("int4", HIDDEN_SIZE // 2 + SCALE_BYTES, 0.0),
    ],
)
def test_every_byte_of_a_run_is_counted_once_and_under_its_kind(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoding: Encoding,
    bytes_per_token: int,
    reference_nll_weight: float,
) -> None:
    channels: list[tuple[str, CountingChannel]] = []

    def counting(address: str, *how: Any) -> CountingChannel:
        channels.append((address, CountingChannel(open_channel(address, *how))))
        return channels[-1][1]

    monkeypatch.setattr(lesft_client.connector, "open_channel", counting)
    settings = server_settings(
        model,
        tmp_path / "server",
        rounds=ROUNDS,
        accumulation=ACCUMULATION,
        batch_size=BATCH_SIZE,
        aggregation_interval=2,
        activation_encoding=encoding,
        gradient_encoding=encoding,
        loss=LossSpec(reference_nll_weight=reference_nll_weight),
    )
    data = write_samples(tmp_path / "data.jsonl", make_samples(10))
    with (
        running_server(settings) as server,
        running_aggregator(tmp_path / "aggregator") as aggregator,
    ):
        client_settings = train_settings(
            server,
            aggregator,
            tmp_path,
            model=str(model),
            data=str(data),
            held_out=1,
            weights="server",
        )
        TrainCommand(client_settings).run()
    result = json.loads((tmp_path / "state/result.json").read_text())
    wire = result["wire"]

    methods = {(address, frozenset(sizes(channel.sent))) for address, channel in channels}
    assert len(channels) == 4
    assert methods == {
        (server.grpc, frozenset({"DescribeRun"})),
        (server.grpc, frozenset({"FetchFront"})),
        (server.grpc, frozenset({"Train"})),
        (aggregator, frozenset({"Join", "Submit", "Fetch"})),
    }
    sent = [message for _, channel in channels for message in channel.sent]
    received = [message for _, channel in channels for message in channel.received]
    assert result["bytes_up"] == sum(wire["up"].values()) == sum(sizes(sent).values())
    assert result["bytes_down"] == sum(wire["down"].values()) == sum(sizes(received).values())

    samples = drawn_samples(client_settings, server.spec.seed)
    base_tokens = sum(len(s.base_ids) + len(s.target_ids) for s in samples)
    reference_tokens = sum(len(s.reference_ids) + len(s.target_ids) for s in samples)
    assert reference_tokens > base_tokens
    gradient_tokens = base_tokens + (reference_tokens if reference_nll_weight else 0)
    if encoding in QUANTIZED:  # as many bytes as the codes' frequencies make of that
        tables = 2 * ROUNDS * ACCUMULATION * DEFLATE_BYTES
        for way, kind, tokens in (
            ("up", "activations_base", base_tokens),
            ("up", "activations_reference", reference_tokens),
            ("down", "gradients", gradient_tokens),
        ):
            most = tokens * bytes_per_token
            assert 0.7 * most < wire[way][kind] < most + tables
            wire[way][kind] = most
    assert without_other(wire["up"]) == {
        "activations_base": base_tokens * bytes_per_token,
        "activations_reference": reference_tokens * bytes_per_token,
        "labels": 4 * sum(len(s.target_ids) for s in samples),
        "adapters": sizes(sent)["Submit"],
    }
    assert without_other(wire["down"]) == {
        "gradients": gradient_tokens * bytes_per_token,
        "adapters": sizes(received)["Fetch"],
    }
    assert wire["down"]["other"] > sizes(received)["FetchFront"]


def sizes(messages: list[tuple[str, int]]) -> dict[str, int]:
    """Bytes by method."""
    totals: dict[str, int] = {}
    for method, num_bytes in messages:
        totals[method] = totals.get(method, 0) + num_bytes
    return totals


def without_other(counts: Mapping[Any, int]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count and kind != "other"}


def drawn_samples(settings: TrainSettings, seed: int) -> list[EncodedSample]:
    """The training samples of the run in the order in which the client draws them."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    samples, _ = encode_samples(samples_of(settings, "train"), tokenizer, max_length=64)
    positions = range(ROUNDS * ACCUMULATION * BATCH_SIZE)
    return [samples[sample_index(seed, "client-0", p, len(samples))] for p in positions]


def test_what_is_no_known_part_of_a_message_is_other() -> None:
    wire = WireCounter()
    wire.add_message("up", 100, {"activations_base": 60, "labels": 8})
    wire.add_message("up", 10, {})
    wire.add("up", "labels", 4)
    wire.add("down", "gradients", 7)
    assert without_other(wire.by_kind()["up"]) == {"activations_base": 60, "labels": 12}
    assert wire.by_kind()["up"]["other"] == 32 + 10
    assert (wire.total("up"), wire.total("down")) == (114, 7)


def test_the_counts_of_an_earlier_process_are_added() -> None:
    earlier, wire = WireCounter(), WireCounter()
    earlier.add("up", "labels", 8)
    earlier.add("down", "gradients", 5)
    wire.add("up", "labels", 4)
    wire.add_all(json.loads(json.dumps(earlier.by_kind())))
    assert without_other(wire.by_kind()["up"]) == {"labels": 12}
    assert (wire.total("up"), wire.total("down")) == (12, 5)


def test_a_copy_of_the_counts_does_not_change_later() -> None:
    wire = WireCounter()
    before: Any = wire.by_kind()
    wire.add("up", "labels", 4)
    assert before["up"]["labels"] == 0
