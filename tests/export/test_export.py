"""`lesft-client export` from two state folders: what comes out, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lesft.adapter_halves import save_half
from lesft.errors import HandshakeMismatch, InvalidInput, ModelError
from lesft_client.export import export
from lesft_client.settings import ExportSettings
from tests.export.harness import RESULT, SplitModel, logits_of, save_base, tokenizer_of, with_info

ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return save_base(tmp_path_factory.mktemp("tiny-base"), "llama", tokenizer)


@pytest.fixture(scope="module")
def split(base: Path) -> SplitModel:
    return SplitModel(base)


@pytest.fixture
def states(split: SplitModel, tmp_path: Path) -> tuple[Path, Path]:
    """The state folders of a client and of the server."""
    return split.save(tmp_path)


def run_export(states: tuple[Path, Path], output: Path, **options: Any) -> str:
    return export(ExportSettings(state=states[0], back=states[1], output=output, **options))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3", "starcoder2"])
def test_adapter_and_merged_model_say_what_front_and_back_say(
    tmp_path: Path, tokenizer: Path, family: str
) -> None:
    base = save_base(tmp_path / "base", family, tokenizer)
    split = SplitModel(base, family)
    states = split.save(tmp_path)
    run_export(states, tmp_path / "adapter", model=str(base))
    run_export(states, tmp_path / "merged", model=str(base), merged=True)

    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    untrained_LV, expected_LV = logits_of(whole), split.logits_LV()
    tuned = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(tuned), expected_LV)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert merged.dtype == torch.float32
    assert merged.config.tie_word_embeddings == whole.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(merged), expected_LV, rtol=1e-4, atol=1e-5)
    assert (untrained_LV - expected_LV).abs().max() > 1e-2


def test_the_adapter_names_its_base_and_its_settings(
    states: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    said = run_export(states, tmp_path / "out", model=str(base))
    assert said.startswith(
        f"{tmp_path / 'out'} holds the PEFT adapter of run lesft after 9 rounds, "
    )
    assert names_in(tmp_path / "out") == ADAPTER_FILES
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 12, 0.2)
    assert sorted(config["target_modules"]) == ["down_proj", "gate_proj", "up_proj"]
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["inference_mode"] is True
    assert config["peft_version"] == peft.__version__


@pytest.mark.parametrize(
    ("model", "named"), [("", None), ("someone/model", "someone/model")], ids=["run's", "hub id"]
)
def test_the_card_tells_what_the_adapter_is(
    states: tuple[Path, Path], split: SplitModel, tmp_path: Path, model: str, named: str | None
) -> None:
    run_export(states, tmp_path / "out", model=model)
    card = (tmp_path / "out" / "README.md").read_text()
    name = named or split.spec.model_name
    head = ["---", f'base_model: "{name}"', "library_name: peft", "pipeline_tag: text-generation"]
    assert card.splitlines()[:8] == [*head, "tags:", "- lesft", "- lora", "---"]
    assert f'base = "{name}"' in card
    for row in (
        "| rounds | 9 |",
        "| training samples | 12 |",
        "| training loss, first and last round | 2.5000, 0.5000 |",
        "| held-out -log P per token, before and after | 1.5000, 0.5000 |",
        "| sent and received | 3.0 MB, 1.5 MB |",
        "| lora.rank | 3 |",
        "| lora.target_modules | gate_proj, up_proj, down_proj |",
        "| cut_layer | 1 |",
        "Of one client of the 2, which exported this.",
    ):
        assert row in card.splitlines(), row
    assert "token ids of the targets: the answers it could read as they are" in card
    assert f"peft {peft.__version__}" in card


def test_without_figures_the_card_has_none(states: tuple[Path, Path], tmp_path: Path) -> None:
    (states[0] / "result.json").write_text(json.dumps({**RESULT, "num_samples": None}))
    run_export(states, tmp_path / "out")
    assert "## Figures" not in (tmp_path / "out" / "README.md").read_text()


def test_the_merged_model_comes_in_the_dtype_of_its_base_with_its_tokenizer(
    split: SplitModel, base: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    states = SplitModel(half).save(tmp_path)
    run_export(states, tmp_path / "out", model=str(half), merged=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert not any(".lora_" in name for name, _ in merged.named_parameters())
    text = "Add 3 and 6."
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids
    assert ids == AutoTokenizer.from_pretrained(base)(text).input_ids
    names = names_in(tmp_path / "out")
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} < set(names)
    mode = (states[0] / "run_spec.json").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {mode}
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


# ---------------------------------------------------------------------- the output folder


def test_an_earlier_export_is_replaced(states: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_export(states, output)
    before = (output / "adapter_model.safetensors").read_bytes()
    (output / "adapter_model.safetensors").write_bytes(b"old")
    run_export(states, output)
    assert (output / "adapter_model.safetensors").read_bytes() == before
    assert names_in(output) == ADAPTER_FILES


@pytest.mark.parametrize(
    ("name", "merged"), [("thesis.tex", False), ("README.md", False), ("model.safetensors", True)]
)
def test_a_folder_with_other_files_is_left_alone(
    states: tuple[Path, Path], base: Path, tmp_path: Path, name: str, merged: bool
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text("years of work")
    with pytest.raises(InvalidInput) as caught:
        run_export(states, output, merged=merged, model=str(base))
    assert str(caught.value) == (
        f"--output {output} holds {name!r}, which no export of an adapter has written: give a "
        "folder of its own"
    )
    assert (output / name).read_text() == "years of work"
    assert names_in(output) == [name]


# ---------------------------------------------------------------------- refused


def test_halves_that_do_not_match_leave_nothing_behind(
    states: tuple[Path, Path], split: SplitModel, tmp_path: Path
) -> None:
    save_half(states[1] / "adapter.safetensors", with_info(split.back, rounds=6))
    with pytest.raises(HandshakeMismatch, match=r"^rounds: front 9, back 6; "):
        run_export(states, tmp_path / "out")
    (states[1] / "adapter.safetensors").unlink()
    with pytest.raises(ModelError, match=r"server has no adapter\.safetensors: is the training "):
        run_export(states, tmp_path / "out")
    with pytest.raises(HandshakeMismatch, match=r"^side: the back's half was expected"):
        run_export((states[0], states[0]), tmp_path / "out")
    assert not any((tmp_path / "out").glob("*"))


def test_a_state_folder_of_two_runs_is_refused(
    states: tuple[Path, Path], split: SplitModel, tmp_path: Path
) -> None:
    other = split.spec.model_copy(update={"seed": 5})
    (states[0] / "run_spec.json").write_text(other.model_dump_json())
    with pytest.raises(HandshakeMismatch, match=r"^spec_fingerprint: run_spec\.json sha256:"):
        run_export(states, tmp_path / "out")
    (states[0] / "run_spec.json").unlink()
    with pytest.raises(ModelError, match=r"has no run_spec\.json: give the whole --state"):
        run_export(states, tmp_path / "out")


def test_another_base_is_refused(
    states: tuple[Path, Path], split: SplitModel, tmp_path: Path
) -> None:
    other = save_base(tmp_path / "other", "qwen2")
    for merged in (False, True):
        with pytest.raises(HandshakeMismatch) as caught:
            run_export(states, tmp_path / "out", model=str(other), merged=merged)
        message = str(caught.value)
        assert message.startswith(f"front_fingerprint: run {split.spec.front_fingerprint}, --model")
        assert message.endswith(f"give the model that was fine-tuned, {split.spec.model_name}")
    assert not (tmp_path / "out").exists()


def test_merging_needs_all_weights_unquantised(
    states: tuple[Path, Path], split: SplitModel, base: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match=r"^--merged needs the base's weights: .* has no \*"):
        run_export(states, tmp_path / "out", model=str(bare), merged=True)
    run_export(states, tmp_path / "adapter", model=str(bare))  # an adapter needs none

    front_only = tmp_path / "front"
    shutil.copytree(base, front_only)
    drop_last_layer(front_only)
    with pytest.raises(ModelError, match=r"lacks the tensor 'model\.layers\.3\..*the whole model"):
        run_export(states, tmp_path / "out", model=str(front_only), merged=True)

    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(ModelError, match="is quantised: give a copy that is not"):
        run_export(states, tmp_path / "out", model=str(quantised), merged=True)
    assert not any((tmp_path / "out").glob("*"))


def drop_last_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers.3." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the server's half of the adapter comes from --server or from --back: give one"),
        ({"server": "a:1", "back": "b"}, "comes from --server or from --back: give one of the two"),
        ({"back": "b", "merged": True}, "--merged needs --model: a folder or hub id with the base"),
    ],
    ids=["no half", "two halves", "merged into nothing"],
)
def test_options_that_make_no_sense_together_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExportSettings(state=Path("s"), output=Path("o"), **options)
