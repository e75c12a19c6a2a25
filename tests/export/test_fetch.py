"""The server's half over a real socket, shared or not, and what a client does not believe."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lesft.adapter_halves import AdapterHalf, load_half
from lesft.bundle import bundle_chunks, bundle_info
from lesft.errors import (
    BundleError,
    HandshakeMismatch,
    LesftError,
    NotAllowed,
    OutOfOrder,
    TooLarge,
)
from lesft.spec import PROTOCOL_VERSION
from lesft.split import back_hidden, front_forward, head_logits
from lesft.tensors import encode_tensors
from lesft.v1 import model_pb2, model_pb2_grpc
from lesft_client.adapter_fetch import fetch_back, read_back
from lesft_client.connection_settings import ConnectionSettings
from lesft_client.connector import Connector
from lesft_client.export import export
from lesft_client.settings import ExportSettings
from lesft_client.train import TrainCommand
from tests.client.harness import running_aggregator, train_settings
from tests.export.harness import IDS_BL, SplitModel, logits_of, save_base, with_info
from tests.harness import back_model, make_front, running_server, server_settings
from tests.processes.harness import make_samples, save_model_with_tokenizer, write_samples
from tests.server.harness import raw_channel, refusal, refusal_of

Response = model_pb2.FetchAdapterResponse

NOT_ALLOWED = (
    "this server does not hand out its half of the adapter: ask its operator to start it with "
    "--share-adapter, or to give you its adapter.safetensors for --back"
)


@dataclass(frozen=True)
class Trained:
    """A finished run: its model and the state folders of its server and its client."""

    model: Path
    server: Path
    client: Path
    logits_LV: torch.Tensor

    def settings(self, **options: Any) -> Any:
        return server_settings(self.model, self.server, rounds=1, cut_layer=2, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("run")
    model = save_model_with_tokenizer(folder / "model")
    data = write_samples(folder / "data.jsonl", make_samples(6))
    settings = server_settings(model, folder / "server", rounds=1, cut_layer=2)
    with running_server(settings) as server, running_aggregator(folder / "aggregator") as address:
        options = {"model": str(model), "data": str(data), "held_out": 1}
        TrainCommand(train_settings(server, address, folder, **options)).run()
        front = make_front(model, server.spec, "client-0")
        front.load_adapter(load_half(folder / "state").tensors)
        with torch.no_grad():
            hidden = back_hidden(back_model(server), front_forward(front.model, IDS_BL))
            logits_LV = head_logits(back_model(server), hidden[0])
    return Trained(model, folder / "server", folder / "state", logits_LV)


def test_a_client_exports_what_was_trained_when_the_server_shares(
    trained: Trained, tmp_path: Path
) -> None:
    with running_server(trained.settings(share_adapter=True)) as server:
        settings = ExportSettings(
            state=trained.client, server=server.grpc, output=tmp_path, model=str(trained.model)
        )
        export(settings)
    whole = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32).eval()
    untrained_LV = logits_of(whole)
    tuned = PeftModel.from_pretrained(whole, tmp_path).eval()
    assert torch.equal(logits_of(tuned), trained.logits_LV)
    assert not torch.equal(untrained_LV, trained.logits_LV)
    card = (tmp_path / "README.md").read_text()
    assert "Of its client." in card
    result = json.loads((trained.client / "result.json").read_text())
    assert f"| training samples | {result['num_samples']} |" in card


def test_a_server_that_does_not_share_says_the_way_out(trained: Trained, tmp_path: Path) -> None:
    with running_server(trained.settings()) as server:
        settings = ExportSettings(state=trained.client, server=server.grpc, output=tmp_path / "out")
        with pytest.raises(NotAllowed) as caught:
            export(settings)
        assert str(caught.value) == f"server {server.grpc}: {NOT_ALLOWED}"
    assert not (tmp_path / "out").exists()
    export(settings.model_copy(update={"server": "", "back": trained.server}))


def test_a_server_writes_a_half_of_an_older_lesft_anew(trained: Trained) -> None:
    file = trained.server / "adapter.safetensors"
    before, half = file.read_bytes(), load_half(file)
    save_file(half.tensors, file)
    with running_server(trained.settings()):
        assert file.read_bytes() == before


def test_before_the_last_round_there_is_nothing_to_fetch(trained: Trained, tmp_path: Path) -> None:
    settings = trained.settings(share_adapter=True).model_copy(update={"state": tmp_path})
    with running_server(settings) as server, pytest.raises(OutOfOrder) as caught:
        fetch_back(
            Connector(server.grpc, ConnectionSettings(), "server"), 5, load_half(trained.client)
        )
    assert str(caught.value) == (
        f"server {server.grpc}: the run is not finished: 0 of 1 rounds are done; ask again after "
        "the last one"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("protocol_version", 1, f"protocol_version: server {PROTOCOL_VERSION}, client 1; install "),
        ("spec_fingerprint", "sha256:0", "spec_fingerprint: server {}, client sha256:0; both "),
        ("spec_fingerprint", "", "spec_fingerprint: server {}, client none; both halves must be "),
        ("rounds", 6, "rounds: server 1, client 6; both halves must be of the same run, each "),
    ],
)
def test_the_server_refuses_a_client_of_another_run_by_name(
    trained: Trained, field: str, value: Any, message: str
) -> None:
    info = load_half(trained.client).info
    fields = {
        "protocol_version": PROTOCOL_VERSION,
        "spec_fingerprint": info.spec_fingerprint,
        "rounds": info.rounds,
    }
    request = model_pb2.FetchAdapterRequest(**{**fields, field: value})
    with (
        running_server(trained.settings(share_adapter=True)) as server,
        raw_channel(server.grpc) as channel,
    ):
        stub = model_pb2_grpc.ModelServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.FetchAdapter(request))
    found = refusal_of(caught.value)
    assert replace(found, message="") == refusal(HandshakeMismatch, "")
    assert found.message.startswith(message.format(info.spec_fingerprint))


# ---------------------------------------------------------------------- a server that lies


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> SplitModel:
    return SplitModel(save_base(tmp_path_factory.mktemp("base"), "llama"))


def responses(back: AdapterHalf, **changes: Any) -> list[Response]:
    """The messages that hand out a half; `changes` are fields of the header."""
    data = encode_tensors(back.tensors, "raw")
    fields = {**back.info.model_dump(exclude={"side"}), "num_layers": 4}
    header = model_pb2.AdapterHeader(**{**fields, "bundle": bundle_info(data), **changes})
    return [Response(header=header), *(Response(chunk=chunk) for chunk in bundle_chunks(data))]


def test_an_honest_half_is_taken_as_it_is(split: SplitModel) -> None:
    half = read_back(iter(responses(split.back)), split.front)
    assert half.info == split.back.info
    assert half.tensors.keys() == split.back.tensors.keys()
    assert all(torch.equal(half.tensors[n], t) for n, t in split.back.tensors.items())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"bundle": {"total_bytes": 2**50}}, TooLarge, "bundle of 1125899906842624 bytes"),
        ({"num_layers": 2**31}, BundleError, "num_layers must lie between 2 and 1024, got 2147"),
        ({"num_layers": 1}, BundleError, "num_layers must lie between 2 and 1024, got 1"),
        ({"num_layers": 3}, BundleError, "12 tensors expected, got 18; not expected: 'model.lay"),
        ({"num_layers": 5}, BundleError, "24 tensors expected, got 18; missing: 'model.layers.4"),
        ({"cut_layer": 0}, HandshakeMismatch, "cut_layer: server 0, client 1; ask the server "),
        ({"rounds": 6}, HandshakeMismatch, "rounds: server 6, client 9; ask the server that the"),
        ({"run_id": "other"}, HandshakeMismatch, "run_id: server other, client lesft; ask the "),
    ],
)
def test_a_header_that_cannot_be_right_is_refused(
    split: SplitModel, changes: dict[str, Any], kind: type[LesftError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        read_back(iter(responses(split.back, **changes)), split.front)
    assert str(caught.value).startswith(message)


def test_too_large_a_bundle_is_refused_before_its_first_byte(split: SplitModel) -> None:
    big = {name: tensor.repeat(1, 40) for name, tensor in split.back.tensors.items()}
    header, *_ = responses(replace(split.back, tensors=big))

    def only_the_header() -> Iterator[Response]:
        yield header
        raise AssertionError("a chunk was asked for")

    with pytest.raises(TooLarge, match="are allowed here"):
        read_back(only_the_header(), split.front)


def test_messages_and_tensors_that_cannot_be_right_are_refused(split: SplitModel) -> None:
    header, chunk = responses(split.back)
    first = next(iter(split.back.tensors))
    nan = {**split.back.tensors, first: torch.full_like(split.back.tensors[first], torch.nan)}
    for messages, rule in (
        ([], "must begin with its header"),
        ([chunk, header], "must begin with its header"),
        ([header, header], "a chunk of the adapter was due"),
        ([header], "bundle ended after 0 of"),
        ([header, chunk, chunk], "after the bundle's last one"),
        (responses(replace(split.back, tensors=nan)), f"'{first}' has values that are NaN"),
    ):
        with pytest.raises(BundleError, match=rule):
            read_back(iter(messages), split.front)


def test_the_halves_of_a_lying_server_do_not_join(split: SplitModel) -> None:
    with pytest.raises(HandshakeMismatch, match=r"^spec_fingerprint: server sha256:0, client "):
        read_back(iter(responses(with_info(split.back, spec_fingerprint="sha256:0"))), split.front)
