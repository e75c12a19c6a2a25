"""Training without a server: the whole model in one process, alone and with an aggregator."""

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lesft.adapters import layer_of
from lesft.errors import InvalidInput
from lesft_client.data import encode_samples
from lesft_client.data_command import samples_of
from lesft_client.local_run import LocalRun
from lesft_client.progress import ProgressDisplay
from lesft_client.tokenizer import load_tokenizer
from lesft_client.train import TrainCommand
from lesft_client.train_settings import TrainSettings
from tests import tiny_models
from tests.client.harness import running_aggregator, train_settings
from tests.harness import running_server, server_settings
from tests.processes.harness import make_samples, save_model_with_tokenizer, write_samples
from tests.tiny_models import NUM_LAYERS

SECONDS = 60
"""How long a test waits for what is sure to come."""

RUN: dict[str, Any] = {
    "rounds": 4,
    "accumulation": 2,
    "aggregation_interval": 2,
    "max_length": 64,
    "optimizer": {"learning_rate": 1e-2},
}
CUT = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


def local_settings(model: Path, folder: Path, **options: Any) -> TrainSettings:
    """Settings of a client without a server; `run` changes single settings of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "local": True,
        "model": str(model),
        "data": str(write_samples(folder / "data.jsonl", make_samples(20))),
        "state": folder / "state",
        "control": "127.0.0.1:0",
        "client_id": "a",
        "progress": "lines",
        "cut_layer": CUT,
        **options,
        "run": {**RUN, **options.get("run", {})},
    }
    return TrainSettings(**values)


def train(settings: TrainSettings) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A whole run; its result.json and its adapter."""
    TrainCommand(settings).run()
    return result_of(settings), adapter_of(settings)


def result_of(settings: TrainSettings) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((settings.state / "result.json").read_text())
    return result


def adapter_of(settings: TrainSettings) -> dict[str, torch.Tensor]:
    return load_file(settings.state / "adapter" / "adapter_model.safetensors")


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ---------------------------------------------------------------------- alone


def likelihood(model: torch.nn.Module, settings: TrainSettings) -> float:
    """Sum of -log P over the held-out targets, by the library alone."""
    samples, _ = encode_samples(samples_of(settings, "test"), load_tokenizer(settings.model), 64)
    assert len(samples) == settings.held_out
    total = 0.0
    for sample in samples:
        ids = torch.tensor([sample.base_ids + sample.target_ids])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        targets = torch.tensor(sample.target_ids)
        predicting = log_probs[-len(targets) - 1 : -1]
        total -= float(predicting.gather(1, targets.unsqueeze(1)).sum())
    return total


def test_one_client_leaves_an_adapter_that_peft_scores_as_it_did(
    model: Path, tmp_path: Path
) -> None:
    settings = local_settings(model, tmp_path, held_out=2)
    result, adapter = train(settings)
    assert {layer_of(name.removeprefix("base_model.model.")) for name in adapter} == {0, 1, 2, 3}
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    before, after = result["held_out_before"], result["held_out_after"]
    assert before["nll_sum"] == pytest.approx(likelihood(plain, settings), rel=1e-5)
    tuned = PeftModel.from_pretrained(plain, settings.state / "adapter").eval()
    assert after["nll_sum"] == pytest.approx(likelihood(tuned, settings), rel=1e-5)
    assert after["nll_sum"] < 0.95 * before["nll_sum"]

    assert (result["round"], result["rounds"], result["adapter_version"]) == (4, 4, 0)
    assert result["num_samples"] == 18
    assert len(result["loss_by_round"]) == 4
    assert (result["bytes_up"], result["bytes_down"]) == (0, 0)
    spec = json.loads((settings.state / "run_spec.json").read_text())
    assert (spec["rounds"], spec["cut_layer"], spec["clients"]) == (4, CUT, 1)
    assert not (settings.state / "adapter.safetensors").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_counts_once_also_where_embedding_and_head_are_one(
    tied: bool, model: Path, tmp_path: Path
) -> None:
    folder = save_model_with_tokenizer(tmp_path / "model")
    options = {"vocab_size": 300, "tie_word_embeddings": tied}
    whole = tiny_models.save_tiny_model(folder, "llama", **options)
    result, adapter = train(local_settings(folder, tmp_path, run={"rounds": 1}))
    trained = sum(tensor.numel() for tensor in adapter.values())
    assert result["trained_parameters"] == trained
    assert result["parameters"] == whole.num_parameters() + trained


def test_dropout_differs_between_clients_of_one_run_on_both_sides_of_the_cut(
    model: Path, tmp_path: Path
) -> None:
    """Same samples, in the same order: only the draws differ."""
    several = {"clients": 2, "aggregate": False, "rounds": 1, "accumulation": 1}
    adapters = []
    for dropout in (0.5, 0.0):
        for name in "ab":
            settings = local_settings(
                model,
                tmp_path / f"{name} {dropout}",
                client_id=name,
                samples=1,
                run={**several, "lora": {"dropout": dropout}},
            )
            adapters.append(train(settings)[1])
    with_dropout, without = adapters[:2], adapters[2:]
    assert same(*without)
    for layer in range(NUM_LAYERS):
        names = [name for name in with_dropout[0] if f"layers.{layer}." in name]
        assert not same(*({n: adapter[n] for n in names} for adapter in with_dropout))


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_that_was_interrupted_goes_on_to_the_same_adapter(
    rounds: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first window and in the second, from the beginning and from a checkpoint."""
    expected, adapter = train(local_settings(model, tmp_path / "undisturbed", held_out=2))
    settings = local_settings(model, tmp_path / "interrupted", held_out=2)
    done = ProgressDisplay.round_done

    def stop(display: ProgressDisplay) -> None:
        done(display)
        if len(display._status.loss_by_round) == rounds:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "round_done", stop)
        with pytest.raises(Stopped):
            TrainCommand(settings).run()
    assert not (settings.state / "result.json").exists()
    result, resumed = train(settings)
    assert same(resumed, adapter)
    for name in ("loss_by_round", "held_out_before", "held_out_after", "tokens", "adapter_sha256"):
        assert result[name] == expected[name], name


# ---------------------------------------------------------------------- with others


@pytest.fixture
def one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a model turns some of torch off, for all threads."""
    lock, load = threading.Lock(), LocalRun.load

    def one(run: LocalRun, spec: Any) -> Any:
        with lock:
            return load(run, spec)

    monkeypatch.setattr(LocalRun, "load", one)


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[str]:
    with running_aggregator(tmp_path / "aggregator", clients=2) as address:
        yield address


def two_clients(
    model: Path, folder: Path, aggregator: str = "", **run: Any
) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Both clients' results, trained side by side."""
    everything = [
        local_settings(
            model,
            folder / name,
            client_id=name,
            share=f"{number}/2",
            aggregator=aggregator,
            run={"clients": 2, "lora": {"dropout": 0.0}, "adapter_encoding": "raw", **run},
        )
        for number, name in enumerate("ab", start=1)
    ]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(train, everything, timeout=SECONDS))


@pytest.mark.usefixtures("one_model_at_a_time")
def test_clients_with_an_aggregator_end_with_one_adapter_of_the_whole_model(
    model: Path, tmp_path: Path, aggregator: str
) -> None:
    (result_a, a), (result_b, b) = two_clients(model, tmp_path, aggregator)
    assert same(a, b)
    assert result_a["adapter_sha256"] == result_b["adapter_sha256"]
    assert [result["adapter_version"] for result in (result_a, result_b)] == [2, 2]
    assert result_a["loss_by_round"] != result_b["loss_by_round"]
    adapter_bytes = sum(tensor.numel() * 4 for tensor in a.values())
    for way in ("up", "down"):
        assert result_a["wire"][way]["adapters"] == pytest.approx(2 * adapter_bytes, rel=0.1)
        assert result_a["wire"][way]["adapters"] >= 2 * adapter_bytes
        others = {"activations_base", "activations_reference", "gradients", "labels"}
        assert {result_a["wire"][way][kind] for kind in others} == {0}


@pytest.mark.usefixtures("one_model_at_a_time")
def test_personal_layers_stay_apart_where_the_others_are_averaged(
    model: Path, tmp_path: Path, aggregator: str
) -> None:
    (result_a, a), (_, b) = two_clients(model, tmp_path, aggregator, personal_layers=(0, 3))
    differing = {
        layer_of(name.removeprefix("base_model.model."))
        for name in a
        if not torch.equal(a[name], b[name])
    }
    assert differing == {0, 3}
    shared_bytes = sum(
        tensor.numel() * 4
        for name, tensor in a.items()
        if "layers.1." in name or "layers.2." in name
    )
    assert result_a["wire"]["up"]["adapters"] == pytest.approx(2 * shared_bytes, rel=0.1)


def test_clients_that_average_nothing_need_no_aggregator_and_differ(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [
        train(
            local_settings(
                model,
                tmp_path / name,
                client_id=name,
                share=share,
                run={"clients": 2, "aggregate": False},
            )
        )[1]
        for name, share in (("a", "1/2"), ("b", "2/2"))
    ]
    assert adapters[0].keys() == adapters[1].keys()
    assert not any(torch.equal(adapters[0][n], adapters[1][n]) for n in adapters[0])
    assert "joined" not in capsys.readouterr().err, "there is nobody to wait for"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("options", [{"aggregate": False}, {"train_front": False}])
def test_a_split_run_that_averages_nothing_leaves_the_aggregator_alone(
    named: bool,
    options: dict[str, Any],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_samples(tmp_path / "data.jsonl", make_samples(4))
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        running_server(server_settings(model, tmp_path / "server", **options)) as server,
    ):
        address = f"127.0.0.1:{listening.getsockname()[1]}" if named else ""
        settings = train_settings(server, address, tmp_path, model=str(model), data=str(data))
        TrainCommand(settings).run()
        listening.settimeout(0)
        with pytest.raises(BlockingIOError):
            listening.accept()
    result = result_of(settings)
    assert (result["round"], result["adapter_version"]) == (2, 0)
    assert {result["wire"][way]["adapters"] for way in ("up", "down")} == {0}
    said = "this run averages no adapters: --aggregator is not used"
    assert (said in capsys.readouterr().err) == named
    trained = result["trained_parameters"]
    assert (trained > 0) == options.get("train_front", True)


# ---------------------------------------------------------------------- refused

NEEDS_AGGREGATOR = (
    "--aggregator is needed: 2 clients average their adapters; else set --run.clients 1 or "
    "--no-run.aggregate"
)
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "neither server nor local": (
        {"local": False, "run": None},
        "--server HOST:PORT is needed, or --local to train without one",
    ),
    "a run of its own with a server": (
        {"local": False, "server": "s:1"},
        "--run.* is for --local: with a server, the run is the server's",
    ),
    "a server": ({"server": "s:1"}, "--local trains without a server: leave --server out"),
    "no run": ({"run": None}, "--local needs to know the run: give --run.rounds at least"),
    "adapters to insist on": (
        {"lora": {"rank": 4}},
        "--lora.* and encodings are what to refuse a server's run for; with --local, set "
        "--run.lora.*",
    ),
    "a front that does not train": (
        {"run": {"rounds": 1, "train_front": False}},
        "--no-run.train-front is for split runs: here nothing stands between front and back",
    ),
    "weights in 8 bits": (
        {"precision": "int8"},
        "--precision int8 is for the front of a split run: with --local, take bf16",
    ),
    "no aggregator": ({"run": {"rounds": 1, "clients": 2}}, NEEDS_AGGREGATOR),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_contradict_each_other_are_refused(what: str, tmp_path: Path) -> None:
    changes, message = SETTINGS[what]
    right = {"local": True, "model": "m", "data": "d", "state": tmp_path, "run": {"rounds": 1}}
    TrainSettings(**right)
    with pytest.raises(ValidationError) as caught:
        TrainSettings(**{**right, **changes})
    assert [error["msg"] for error in caught.value.errors()] == [f"Value error, {message}"]


def test_a_run_that_does_not_fit_the_model_is_refused(model: Path, tmp_path: Path) -> None:
    for changes, message in (
        (
            {"cut_layer": 4},
            "cut_layer must lie between 1 and 3 for this 4-layer model, got 4",
        ),
        (
            {"run": {"personal_layers": (1, 4)}},
            "personal_layers must lie between 0 and 3, the layers that a client trains, got 4",
        ),
        (
            {"run": {"personal_layers": (0, 1, 2, 3)}},
            "personal_layers must leave a layer to average, got all 4 that a client trains: turn "
            "aggregate off instead",
        ),
    ):
        with pytest.raises(InvalidInput) as caught:
            TrainCommand(local_settings(model, tmp_path, **changes)).run()
        assert str(caught.value) == message


def test_a_split_run_that_averages_says_that_it_needs_the_aggregator(
    model: Path, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "data.jsonl", make_samples(4))
    with running_server(server_settings(model, tmp_path / "server")) as server:
        settings = train_settings(server, "", tmp_path, model=str(model), data=str(data))
        with pytest.raises(InvalidInput) as caught:
            TrainCommand(settings).run()
    assert str(caught.value) == (
        "this run averages its clients' adapters: give --aggregator HOST:PORT"
    )
