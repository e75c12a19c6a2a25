"""`lesft-testbed run` as a user has it: real processes from the first to the last."""

import hashlib
import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.processes.harness import Process, save_model_with_tokenizer
from tests.testbed.running import (
    CLIENTS,
    RUN_SECONDS,
    SAMPLES,
    held_out_nll,
    running_testbed,
    services_of,
    write_data,
)

KINDS = {"activations_base", "activations_reference", "gradients", "labels", "adapters", "other"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_run_leaves_report_picture_logs_and_an_adapter_that_reproduces_its_figures(
    model: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "report.json").write_text("an earlier run's")
    options = (
        *("--rounds=6", "--optimizer.learning-rate=0.02", "--lora.dropout=0"),
        *("--questions=3", "--measure=both", "--max-tokens=20"),
    )
    with running_testbed(model, data, output, *options) as process:
        assert process.wait(RUN_SECONDS) == 0, process.output
        assert services_of(output) == []

    names = {path.name for path in output.iterdir()}
    logs = {"server.log", "aggregator.log", "client-0.log", "client-1.log"}
    logs |= {"questions-before.log", "questions-after.log"}
    results = {"report.json", "report.md", "loss.png", "adapter", "serve.json", "questions.json"}
    assert names == {*results, "state", "lock", *logs}

    report = json.loads((output / "report.json").read_text())
    assert (report["clients"], report["rounds"], report["cut_layer"]) == (CLIENTS, 6, 1)
    assert (report["method"], report["model"]) == ("lesft", model.name)
    assert (report["dataset"], report["samples_per_client"]) == (str(data), SAMPLES)
    assert len(report["loss_by_round"]) == 6
    assert report["nll_by_round"][-1] < report["nll_by_round"][0]
    assert set(report["wire"]) == KINDS
    base = report["wire"]["activations_base"]["up"]
    # As many values; how many bytes their codes take depends on what they are.
    assert report["wire"]["gradients"] == {"up": 0, "down": pytest.approx(base, rel=0.15)}
    assert report["accuracy_questions"] == 3
    questions = json.loads((output / "questions.json").read_text())
    for when in ("before", "after"):
        evaluation = output / "state" / f"questions-{when}" / "evaluation.json"
        figures = json.loads(evaluation.read_text())
        assert report[f"accuracy_{when}"] == figures["accuracy"]
        assert report[f"accuracy_interval_{when}"] == pytest.approx(figures["interval"])
        assert report[f"test_nll_{when}"] == pytest.approx(figures["nll_per_token"])
        assert [question["index"] for question in questions[when]] == [0, 1, 2]
        assert figures["settings"]["untuned"] == (when == "before")
        prompts = [prediction["prompt"] for prediction in figures["predictions"]]
        assert [question["prompt"] for question in questions[when]] == prompts
        assert report["questions_digest"] == figures["data_digest"]
    assert report["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert report["test_nll_after"] < report["test_nll_before"]
    assert set(report["peak_rss_mib"]) == {"server", "aggregator", "client-0", "client-1"}
    assert all(peak > 20 for peak in report["peak_rss_mib"].values())
    assert 0 < report["seconds"]["training"] < report["seconds"]["total"]

    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    before = held_out_nll(whole, tokenizer, data)
    tuned = PeftModel.from_pretrained(whole, output / "adapter")
    card = (output / "adapter" / "README.md").read_text()
    assert f'base_model: "{model.name}"' in card
    assert f"Of all {CLIENTS} clients." in card
    first, last = report["loss_by_round"][0], report["loss_by_round"][-1]
    assert f"| training loss, first and last round | {first:.4f}, {last:.4f} |" in card
    assert report["heldout_nll_before"] == pytest.approx(before, abs=1e-4)
    assert report["heldout_nll_after"] == pytest.approx(
        held_out_nll(tuned, tokenizer, data), abs=1e-4
    )
    assert report["heldout_nll_after"] < report["heldout_nll_before"]
    assert f"{output}/adapter" in process.output
    assert f"use it:  lesft-testbed serve --output {output}" in process.output

    prompt = "Add 3 and 6.\n\n"
    with serving(output) as address:
        asked = {"model": model.name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{address}/completions", json=asked, timeout=30).json()
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        written = tuned.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["text"] == expected


@contextmanager
def serving(output: Path) -> Iterator[str]:
    """The endpoint of a finished run, and its address."""
    arguments = ("serve", f"--output={output}", "--listen=127.0.0.1:0")
    process = Process("lesft-testbed", *arguments, cwd=output.parent)
    try:
        line = process.wait_for_line("ready: http://")
        yield line.split()[1]
        process.signal(signal.SIGINT)
        assert process.wait() == 130
        assert services_of(output) == []
    finally:
        services = services_of(output)
        process.end()
        for service in services:
            service.kill()


def test_when_one_client_dies_the_testbed_names_it_and_ends_all_others(
    model: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with running_testbed(model, data, output, "--rounds=100000") as process:
        process.wait_for_line("round 3/100000")
        [victim] = [
            each for each in services_of(output) if "--client-id=client-1" in each.cmdline()
        ]
        victim.kill()
        assert process.wait() == 1
        assert services_of(output) == []
    log = output / "client-1.log"
    expected = f"lesft-testbed: client-1 was ended by signal SIGKILL; the end of {log}:"
    assert expected in process.lines
    assert "Traceback" not in process.output
    assert "client-1 is away at round" in (output / "server.log").read_text()


def test_ctrl_c_ends_all_services_and_says_so(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with running_testbed(model, data, output, "--rounds=100000") as process:
        process.wait_for_line("round 1/100000")
        assert len(services_of(output)) == 2 + CLIENTS
        process.signal(signal.SIGINT)
        assert process.wait() == 130
        assert services_of(output) == []
    assert process.lines[-1] == "lesft-testbed: stopped; all services were ended"
    assert "Traceback" not in process.output


def test_a_service_that_cannot_start_ends_the_testbed_with_its_message(
    model: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with running_testbed(model, data, output, "--rounds=2", "--cut-layer=4") as process:
        assert process.wait() == 1
        assert services_of(output) == []
    assert re.search(r"server ended with status 1; the end of .*server\.log:", process.output)
    rule = "cut_layer must lie between 1 and 3 for this 4-layer model, got 4"
    assert process.lines[-1] == f"lesft-server: {rule}"


def test_a_folder_with_other_files_is_left_alone(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with running_testbed(model, data, output, "--rounds=2") as process:
        assert process.wait() == 1
    assert "holds 'thesis.tex', which no run of the testbed has written" in process.output
    assert (output / "thesis.tex").read_text() == "years of work"
