"""Every topology of the compared methods, by real processes: who holds, sends and leaves what."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lesft_client.data import client_share, encode_samples, load_samples
from tests.processes.harness import Process, save_model_with_tokenizer
from tests.testbed.running import (
    CLIENTS,
    RUN_SECONDS,
    SAMPLES,
    held_out_nll,
    running_testbed,
    write_data,
)

ROUNDS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(model: Path, data: Path, output: Path, *options: str) -> dict[str, Any]:
    """The report of a run of several rounds."""
    always = (f"--rounds={ROUNDS}", "--optimizer.learning-rate=0.02", "--lora.dropout=0")
    with running_testbed(model, data, output, *always, *options) as process:
        assert process.wait(RUN_SECONDS) == 0, process.output
        lines = [line for line in process.lines if line.startswith("round ")]
        assert len(lines) == ROUNDS
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    assert len(report["loss_by_round"]) == len(report["nll_by_round"]) == ROUNDS
    return report


def logs(output: Path) -> set[str]:
    return {path.stem for path in output.glob("*.log")}


def bytes_by_kind(report: dict[str, Any]) -> dict[str, int]:
    return {kind: ways["up"] + ways["down"] for kind, ways in report["wire"].items()}


def load_whole(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def test_fedavg_trains_the_whole_model_on_each_client_and_sends_nothing_but_adapters(
    model: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = run(model, data, output, "--method=fedavg", "--skew=size", "--aggregation-interval=2")
    assert logs(output) == {"aggregator", "client-0", "client-1"}
    assert (report["method"], report["cut_layer"], report["adapters"]) == (
        *("fedavg", None),
        ["adapter"],
    )
    kinds = bytes_by_kind(report)
    nothing = {"activations_base", "activations_reference", "gradients", "labels"}
    assert {kind for kind, count in kinds.items() if count == 0} >= nothing
    assert kinds["adapters"] > 0
    assert sum(report["samples_by_client"]) == CLIENTS * SAMPLES
    assert (output / "shares.png").read_bytes().startswith(b"\x89PNG")

    whole = load_whole(model)
    weights = sum(parameter.numel() for parameter in whole.parameters())
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    trained = sum(tensor.numel() for tensor in adapter.values())
    assert report["client_trained_parameters"] == trained
    assert report["client_parameters"] in (weights, weights + trained)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tuned = PeftModel.from_pretrained(whole, output / "adapter")
    assert report["heldout_nll_after"] == pytest.approx(
        held_out_nll(tuned, tokenizer, data), abs=1e-4
    )
    assert report["heldout_nll_after"] < report["heldout_nll_before"]

    serving = Process("lesft-testbed", "serve", f"--output={output}", cwd=tmp_path)
    assert serving.wait() == 1
    serving.end()
    assert serving.lines == [
        f"lesft-testbed: the run in {output} had no server, since its method, fedavg, does not "
        f"split the model: lesft-client serve --local --model {model} --adapter {output}/adapter"
    ]


def test_centralized_takes_as_many_steps_on_one_node_with_the_same_samples(
    model: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = run(model, data, output, "--method=centralized")
    assert logs(output) == {"client-0"}
    assert (report["clients"], report["samples_by_client"]) == (1, [CLIENTS * SAMPLES])
    assert report["settings"]["clients"] == CLIENTS
    assert set(bytes_by_kind(report).values()) == {0}
    assert report["adapters"] == ["adapter"]
    assert report["loss_by_round"][-1] < report["loss_by_round"][0]


def test_split_learning_leaves_each_client_its_own_adapter_that_answers_its_own_questions(
    model: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = run(
        *(model, data, output, "--method=sl", "--questions=5"),
        *("--measure=likelihood", "--no-measure-before"),
    )
    asked = {"questions-after-client-0", "questions-after-client-1"}
    assert logs(output) == {"server", "client-0", "client-1", *asked}
    assert bytes_by_kind(report)["adapters"] == 0
    assert report["wire"]["gradients"]["down"] == report["wire"]["activations_base"]["up"]
    assert report["adapters"] == ["adapter/client-0", "adapter/client-1"]
    first, second = (
        load_file(output / folder / "adapter_model.safetensors") for folder in report["adapters"]
    )
    different = {name for name in first if not torch.equal(first[name], second[name])}
    assert different
    assert all(".layers.0." in name for name in different)  # the cut is after the first layer

    questions = json.loads((output / "questions.json").read_text())
    assert questions["before"] is None
    assert [question["index"] for question in questions["after"]] == [0, 1, 2, 3, 4]
    assert all(question["right"] is None for question in questions["after"])
    evaluation = output / "state" / "questions-after-client-1" / "evaluation.json"
    figures = json.loads(evaluation.read_text())
    assert [prediction["index"] for prediction in figures["predictions"]] == [1, 3]
    assert figures["settings"]["adapter"] == str(output / "adapter" / "client-1")
    nll = sum(question["nll"] for question in questions["after"])
    tokens = sum(question["nll_tokens"] for question in questions["after"])
    assert report["test_nll_after"] == pytest.approx(nll / tokens)
    assert (report["accuracy_after"], report["test_nll_before"]) == (None, None)


def test_splitfrozen_sends_each_sample_once_returns_nothing_and_trains_the_back_alone(
    model: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = run(model, data, output, "--method=splitfrozen", "--activation-encoding=raw")
    assert logs(output) == {"server", "client-0", "client-1"}
    kinds = bytes_by_kind(report)
    assert (kinds["gradients"], kinds["adapters"], kinds["activations_reference"]) == (0, 0, 0)
    assert report["client_trained_parameters"] == 0

    tokenizer = AutoTokenizer.from_pretrained(model)
    drawn = load_samples(str(data), "train", CLIENTS * SAMPLES, seed=0)
    tokens = sum(
        len(sample.base_ids) + len(sample.target_ids)
        for index in range(CLIENTS)
        for sample in encode_samples(
            client_share(drawn, index, CLIENTS, SAMPLES, seed=0), tokenizer, 1024
        )[0]
    )
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    assert kinds["activations_base"] == tokens * width * 4

    [folder] = report["adapters"]
    adapter = load_file(output / folder / "adapter_model.safetensors")
    moved = {name for name, tensor in adapter.items() if "lora_B" in name and tensor.any()}
    assert moved
    assert not any(".layers.0." in name for name in moved)
