"""The part `memory`: the files that it makes, its figures, and one real step."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from lesft.weights import Checkpoint
from lesft_testbed.bench.large_model import QWEN_3B, save_large_model, save_sample
from lesft_testbed.bench.memory import Memory, measure_client
from lesft_testbed.bench.part import Bench
from lesft_testbed.bench.settings import BenchSettings, MemorySettings

TINY = {
    **QWEN_3B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 3000,
}


def test_the_figures_are_the_peaks_of_two_precisions_against_their_targets() -> None:
    values = {
        name: {"client_peak_rss_mib": peak}
        for name, peak in {"bf16": 2200.0, "int8": 1600.0, "int4": 900.0, "fp32": 3000.0}.items()
    }
    found = {f.name: (f.compute(values), f.is_met(f.compute(values))) for f in Memory.figures}
    assert found == {
        "client_peak_rss_mib_bf16": (2200.0, True),
        "client_peak_rss_mib_int8": (1600.0, False),
    }


def test_a_real_client_takes_one_step_of_so_many_tokens(tmp_path: Path) -> None:
    (model := tmp_path / "model").mkdir()
    (scratch := tmp_path / "scratch").mkdir()
    save_large_model(model, 0, TINY)
    weight = Checkpoint(model).read("model.layers.1.mlp.up_proj.weight")
    assert (weight.dtype, list(weight.shape)) == (torch.bfloat16, [96, 64])
    save_sample(tmp_path / "sample.jsonl", 0, model, 60)
    sample = json.loads((tmp_path / "sample.jsonl").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    assert len(tokenizer) == 3000
    assert len(tokenizer.encode(sample["prompt"])) == 60 - 15 - 2
    assert len(tokenizer.encode(sample["target"])) == 15 - 1

    settings = BenchSettings(output=tmp_path, threads=1, memory=MemorySettings(cut_layer=1))
    bench = Bench(settings, "", tmp_path, scratch)
    values = measure_client(bench, model, tmp_path / "sample.jsonl", "int8")
    assert values["step_tokens"] == 2 * 60  # both paths
    assert 100 < values["anonymous_mib"] < values["client_peak_rss_mib"] < 1000
    assert 0 < values["front_seconds"] < 60
