"""Reading a model folder: partial loading, the front's fingerprint and its hand-out."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lesft import weights
from lesft.errors import ModelError
from lesft.split import SUPPORTED_FAMILIES, back_hidden, front_forward, head_logits
from lesft.tensor_file import TensorFile
from lesft.weights import Checkpoint, FrontFile, front_fingerprint, load_back, load_front
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE, save_tiny_model, tiny_model

CPU = torch.device("cpu")
EMBEDDING = "model.embed_tokens.weight"
IDS_BL = torch.arange(3, 18).unsqueeze(0)

every_family = pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
every_cut = pytest.mark.parametrize("cut_layer", range(1, NUM_LAYERS))
both_parts = pytest.mark.parametrize("load_part", [load_front, load_back])
LoadPart = Callable[[Checkpoint, int, torch.dtype, torch.device], PreTrainedModel]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An untied model, its LM head a table of its own."""
    save_tiny_model(tmp_path / "model", "llama")
    return tmp_path / "model"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    write_tensors(folder, tensors)


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def fingerprint_of(folder: Path, cut_layer: int = 2) -> str:
    return front_fingerprint(Checkpoint(folder), cut_layer)


def load_float32(load_part: LoadPart, folder: Path, cut_layer: int = 2) -> PreTrainedModel:
    return load_part(Checkpoint(folder), cut_layer, torch.float32, CPU)


def differing(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def layer_of(name: str) -> int | None:
    match = re.search(r"\.layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None


@torch.no_grad()
def split_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    checkpoint = Checkpoint(folder)
    front = load_front(checkpoint, 2, dtype, CPU)
    back = load_back(checkpoint, 2, dtype, CPU)
    return head_logits(back, back_hidden(back, front_forward(front, IDS_BL))[0])


@torch.no_grad()
def whole_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    logits_LV: torch.Tensor = whole(input_ids=IDS_BL, use_cache=False).logits[0]
    return logits_LV


# ---------------------------------------------------------------------- only its own tensors


class RecordingFile(TensorFile):
    """Notes which tensors are asked for; names, dtypes and shapes are not noted."""

    asked: list[str]

    def mapped(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return super().mapped(name)


@pytest.fixture
def asked_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(RecordingFile, "asked", names, raising=False)
    monkeypatch.setattr(weights, "TensorFile", RecordingFile)
    return names


def own_names(folder: Path, load_part: LoadPart, cut_layer: int, head: str) -> list[str]:
    """A part's tensors by their layers' numbers."""
    if load_part is load_front:
        rest, layers = {EMBEDDING}, range(cut_layer)
    else:
        rest, layers = {"model.norm.weight", head}, range(cut_layer, NUM_LAYERS)
    return sorted(name for name in tensors_of(folder) if name in rest or layer_of(name) in layers)


@both_parts
@every_cut
def test_a_part_reads_all_of_its_own_tensors_and_no_other(
    folder: Path, asked_names: list[str], load_part: LoadPart, cut_layer: int
) -> None:
    load_float32(load_part, folder, cut_layer)
    assert sorted(set(asked_names)) == own_names(
        folder, load_part, cut_layer, head="lm_head.weight"
    )


@both_parts
def test_a_part_of_a_tied_model_reads_its_layers_and_the_shared_table(
    tmp_path: Path, asked_names: list[str], load_part: LoadPart
) -> None:
    save_tiny_model(tmp_path, "gemma2")
    load_float32(load_part, tmp_path)
    assert sorted(set(asked_names)) == own_names(tmp_path, load_part, 2, head=EMBEDDING)


def test_opening_a_checkpoint_reads_no_tensor(folder: Path, asked_names: list[str]) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.dtype_and_shape(EMBEDDING) == ("F32", [VOCAB_SIZE, 32])
    assert EMBEDDING in checkpoint
    assert "model.layers.4.mlp.up_proj.weight" not in checkpoint
    assert asked_names == []


@both_parts
def test_a_part_loads_from_a_folder_that_holds_nothing_else(
    folder: Path, load_part: LoadPart
) -> None:
    from_whole = load_float32(load_part, folder).state_dict()
    own = own_names(folder, load_part, 2, head="lm_head.weight")
    whole = tensors_of(folder)
    write_tensors(folder, {name: whole[name] for name in own})
    assert differing(load_float32(load_part, folder).state_dict(), from_whole) == []


def test_layer_1_is_told_from_layers_10_and_11(tmp_path: Path, asked_names: list[str]) -> None:
    save_tiny_model(tmp_path, "llama", num_hidden_layers=12)
    load_float32(load_front, tmp_path)
    fingerprint_of(tmp_path)
    assert {layer_of(name) for name in asked_names} == {None, 0, 1}
    assert torch.equal(split_logits(tmp_path), whole_logits(tmp_path))


@both_parts
def test_a_part_is_frozen_and_in_eval_mode(folder: Path, load_part: LoadPart) -> None:
    part = load_float32(load_part, folder)
    assert [name for name, p in part.named_parameters() if p.requires_grad] == []
    assert [name for name, module in part.named_modules() if module.training] == []


@both_parts
def test_shards_give_the_same_part_as_a_single_file(
    folder: Path, tmp_path: Path, load_part: LoadPart
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    sharded = load_float32(load_part, tmp_path / "shards").state_dict()
    assert differing(sharded, load_float32(load_part, folder).state_dict()) == []


# ---------------------------------------------------------------------- heads, buffers, dtypes


def test_a_tied_head_is_the_embeddings_table(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "granite")
    assert "lm_head.weight" not in tensors_of(tmp_path)
    head = load_float32(load_back, tmp_path).get_parameter("lm_head.weight")
    assert torch.equal(
        head, load_float32(load_front, tmp_path).get_parameter("embed_tokens.weight")
    )
    assert torch.equal(head, tensors_of(tmp_path)[EMBEDDING])


def test_an_untied_head_is_its_own_table(folder: Path) -> None:
    tensors = tensors_of(folder)
    head = load_float32(load_back, folder).get_parameter("lm_head.weight")
    assert torch.equal(head, tensors["lm_head.weight"])
    assert not torch.equal(head, tensors[EMBEDDING])


def test_a_head_of_its_own_in_the_files_of_a_tied_model_is_used_as_the_library_does(
    tmp_path: Path,
) -> None:
    save_tiny_model(tmp_path, "granite")
    tied = split_logits(tmp_path)
    own_head = torch.randn(VOCAB_SIZE, 32, generator=torch.Generator().manual_seed(5))
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": own_head}))
    logits = split_logits(tmp_path)
    assert torch.equal(logits, whole_logits(tmp_path))
    assert not torch.equal(logits, tied)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_files_give_the_librarys_buffers_and_logits(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = dict(whole.model.named_buffers())
    front = load_front(Checkpoint(tmp_path), 2, dtype, CPU)
    back = load_back(Checkpoint(tmp_path), 2, dtype, CPU)

    found = {}
    for part, offset in ((front, 0), (back.get_submodule("model"), 2)):
        for name, buffer in part.named_buffers():
            layer = layer_of(f".{name}")
            if layer is not None:
                name = name.replace(f"layers.{layer}.", f"layers.{layer + offset}.")
            found[name] = buffer
            assert buffer.dtype == expected[name].dtype, name
            assert torch.equal(buffer, expected[name]), name
    assert found.keys() == expected.keys()
    assert any("inv_freq" in name for name in found)
    assert {p.dtype for part in (front, back) for p in part.parameters()} == {dtype}
    assert torch.equal(split_logits(tmp_path, dtype), whole_logits(tmp_path, dtype))


def test_a_config_from_before_rope_parameters_gives_the_librarys_frequencies(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope
    modern = split_logits(folder)
    (folder / "config.json").write_text(json.dumps(values))
    assert torch.equal(split_logits(folder), modern)
    assert torch.equal(whole_logits(folder), modern)


# ---------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_a_sha256_and_the_same_for_shards(folder: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert re.fullmatch("sha256:[0-9a-f]{64}", fingerprint_of(folder))
    assert fingerprint_of(tmp_path / "shards") == fingerprint_of(folder)


def test_every_cut_has_a_fingerprint_of_its_own(folder: Path) -> None:
    assert len({fingerprint_of(folder, cut) for cut in range(1, NUM_LAYERS)}) == NUM_LAYERS - 1


def test_the_fingerprint_reads_the_fronts_tensors_only(
    folder: Path, asked_names: list[str]
) -> None:
    fingerprint_of(folder)
    assert sorted(set(asked_names)) == own_names(folder, load_front, 2, head="lm_head.weight")


def add_to_last_value(name: str, difference: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] += difference

    return change


FRONT_TENSORS = [
    *(EMBEDDING, "model.layers.0.input_layernorm.weight"),
    *("model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.bias"),
]
BACK_TENSORS = [
    *("model.layers.2.input_layernorm.weight", "model.layers.3.mlp.up_proj.weight"),
    *("model.norm.weight", "lm_head.weight"),
]


@pytest.mark.parametrize("name", FRONT_TENSORS)
def test_the_fingerprint_changes_with_one_weight_of_the_front(folder: Path, name: str) -> None:
    before = fingerprint_of(folder)
    change_tensors(folder, add_to_last_value(name, 1e-4))
    changed = fingerprint_of(folder)
    change_tensors(folder, add_to_last_value(name, 0.0))
    assert before != changed == fingerprint_of(folder)


@pytest.mark.parametrize("name", BACK_TENSORS)
def test_the_fingerprint_does_not_change_with_a_weight_of_the_back(folder: Path, name: str) -> None:
    before = fingerprint_of(folder)
    change_tensors(folder, add_to_last_value(name, 1.0))
    assert fingerprint_of(folder) == before


@pytest.mark.parametrize(
    "change",
    [lambda table: table.to(torch.float16), lambda table: table.reshape(32, VOCAB_SIZE)],
    ids=["dtype", "shape"],
)
def test_the_fingerprint_changes_when_the_same_bytes_mean_something_else(
    folder: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    table = torch.zeros(VOCAB_SIZE, 32, dtype=torch.bfloat16)
    change_tensors(folder, lambda tensors: tensors.update({EMBEDDING: table}))
    before = fingerprint_of(folder)
    change_tensors(folder, lambda tensors: tensors.update({EMBEDDING: change(table)}))
    assert fingerprint_of(folder) != before


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"num_hidden_layers": 3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_changes_with_a_config_value_that_matters(
    folder: Path, change: dict[str, Any]
) -> None:
    before = fingerprint_of(folder)
    change_config(folder, **change)
    assert fingerprint_of(folder) != before


VOLATILE = {
    "_name_or_path": "elsewhere",
    "architectures": ["Other"],
    "dtype": "float16",
    "torch_dtype": "float16",
    "transformers_version": "4.0.0",
    "use_cache": False,
    "_attn_implementation": "flash_attention_2",
    "attn_implementation": "somebody/kernel",
    "auto_map": {"AutoModelForCausalLM": "code.Model"},
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("key", VOLATILE)
def test_a_config_value_without_effect_changes_neither_fingerprint_nor_logits(
    folder: Path, key: str
) -> None:
    fingerprint, logits = fingerprint_of(folder), split_logits(folder)
    change_config(folder, **{key: VOLATILE[key]})
    assert json.loads(Checkpoint(folder).config_json)[key] == VOLATILE[key]
    assert fingerprint_of(folder) == fingerprint
    assert torch.equal(split_logits(folder), logits)


def test_the_fingerprint_does_not_change_with_the_configs_layout(folder: Path) -> None:
    before = fingerprint_of(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(values.items()))))
    assert fingerprint_of(folder) == before


# ---------------------------------------------------------------------- hand-out


def read_whole(file: FrontFile, max_bytes: int) -> bytes:
    data = bytearray()
    while chunk := file.read(len(data), max_bytes):
        assert len(chunk) <= max_bytes
        data += chunk
    return bytes(data)


def front_file(folder: Path, cut_layer: int = 2) -> FrontFile:
    return FrontFile(Checkpoint(folder), cut_layer)


@every_cut
def test_the_front_file_holds_exactly_the_fronts_tensors(folder: Path, cut_layer: int) -> None:
    whole = tensors_of(folder)
    own = own_names(folder, load_front, cut_layer, head="lm_head.weight")
    data = read_whole(front_file(folder, cut_layer), 1 << 20)
    assert differing(load(data), {name: whole[name] for name in own}) == []
    assert int.from_bytes(data[:8], "little") % 8 == 0  # the format wants its data aligned


@pytest.mark.parametrize("max_bytes", [1, 7, 4096, 1 << 20])
def test_the_front_file_is_the_same_bytes_in_chunks_of_any_size(
    folder: Path, max_bytes: int
) -> None:
    file = front_file(folder)
    data = read_whole(file, max_bytes)
    assert len(data) == file.size
    assert data == read_whole(front_file(folder), 1 << 14)


def test_the_front_file_can_be_read_from_any_offset(folder: Path) -> None:
    file = front_file(folder)
    data = read_whole(file, 1 << 20)
    generator = torch.Generator().manual_seed(4)
    for _ in range(500):  # in no order, as a download that is taken up again reads
        offset = int(torch.randint(file.size, (1,), generator=generator))
        max_bytes = int(torch.randint(1, 3000, (1,), generator=generator))
        chunk = file.read(offset, max_bytes)
        assert 0 < len(chunk) <= max_bytes
        assert chunk == data[offset : offset + len(chunk)]
    assert file.read(file.size - 1, 10) == data[-1:]
    assert file.read(file.size, 10) == b""
    assert file.read(file.size + 1000, 10) == b""


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "apertus"])
def test_the_front_file_and_the_config_are_a_checkpoint_with_the_same_front(
    tmp_path: Path, family: str
) -> None:
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    tiny_model(family).save_pretrained(whole, max_shard_size="20KB")
    # Norms in float32 among bfloat16, as some models have them.
    for file in whole.glob("*.safetensors"):
        tensors = load_file(file)
        stored = {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}
        save_file(stored, file, metadata={"format": "pt"})
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(read_whole(front_file(whole), 1000))
    (copy / "config.json").write_text(Checkpoint(whole).config_json)

    assert fingerprint_of(copy) == fingerprint_of(whole)
    expected = load_float32(load_front, whole).state_dict()
    assert differing(load_float32(load_front, copy).state_dict(), expected) == []


# ---------------------------------------------------------------------- refusals


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        action()
    return str(caught.value)


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(lambda: Checkpoint(folder)) == (
        f"{folder} has no config.json: give a folder in Hugging Face layout or a hub id"
    )


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert refusal(lambda: Checkpoint(folder)) == (
        f"{folder} has no *.safetensors file: save the model with save_pretrained first"
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "header too small"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "header too large"),
        (lambda data: data[:8] + b"?" + data[9:], "invalid JSON in header"),
        (lambda data: data[:-1], "incomplete metadata, file not fully covered"),
        (lambda data: data + b"\0", "incomplete metadata, file not fully covered"),
    ],
    ids=["empty", "pointer", "header", "truncated", "too long"],
)
def test_a_damaged_safetensors_file_is_refused(
    folder: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message = refusal(lambda: Checkpoint(folder))
    assert message.startswith(f"{file} is no whole safetensors file: ")
    assert reason in message


def test_a_safetensors_link_that_leads_nowhere_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.unlink()
    file.symlink_to(folder / "gone")
    assert refusal(lambda: Checkpoint(folder)) == (
        f"{file} is no whole safetensors file: No such file or directory: {file}"
    )


@pytest.mark.parametrize(
    ("name", "load_part"),
    [
        (EMBEDDING, load_front),
        ("model.layers.1.mlp.down_proj.weight", load_front),
        ("model.layers.2.mlp.down_proj.weight", load_back),
        ("model.norm.weight", load_back),
        ("lm_head.weight", load_back),
    ],
)
def test_a_missing_tensor_is_refused_by_name(folder: Path, name: str, load_part: LoadPart) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(name))
    assert refusal(lambda: load_float32(load_part, folder)) == (
        f"{folder} lacks the tensor {name!r}: is the download complete?"
    )


def test_a_tensor_of_another_shape_than_the_configs_is_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=40)
    assert refusal(lambda: load_float32(load_back, folder)) == (
        f"{folder}: tensor 'model.layers.2.mlp.gate_proj.weight' must have shape [40, 32] by its "
        "config.json, got [48, 32]"
    )


def test_a_quantised_tensor_is_refused(folder: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    change_tensors(
        folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})
    )
    assert refusal(lambda: load_float32(load_back, folder)) == (
        f"{folder}: tensor {name!r} is stored as torch.float8_e4m3fn; give a copy of the model "
        "that is not quantised"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is no JSON: Expecting property name enclosed in double quotes: line 1"),
        ("[" * 100_000, "config.json is no JSON: maximum recursion depth exceeded"),
        ("[]", "config.json names no model_type: is it a model's?"),
        ("null", "config.json names no model_type: is it a model's?"),
        ("{}", "config.json names no model_type: is it a model's?"),
        ('{"model_type": ["llama"]}', "model family ['llama'] is not supported; supported are"),
        ('{"model_type": "gpt_neox"}', "model family 'gpt_neox' is not supported; supported are"),
    ],
)
def test_a_config_that_is_none_or_of_another_family_is_refused(
    folder: Path, text: str, message: str
) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(lambda: Checkpoint(folder)).startswith(message)


def test_a_config_that_is_no_text_is_refused(folder: Path) -> None:
    file = folder / "config.json"
    file.write_bytes(b"\xff\xfe")
    assert refusal(lambda: Checkpoint(folder)).startswith(f"{file} cannot be read: 'utf-8' codec")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "4"}, "Validation error for field 'num_hidden_layers'"),
        ({"hidden_size": 30}, "The hidden size (30) is not a multiple of the number of attention"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "Missing required keys in"),
    ],
)
def test_a_config_value_that_the_library_refuses_is_named(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    change_config(folder, **change)
    refused = refusal(lambda: Checkpoint(folder))
    assert refused.startswith("config.json cannot be used: ")
    assert message in refused


@both_parts
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "bogus"}, "KeyError('bogus')"),
        ({"vocab_size": -1}, "RuntimeError('Trying to create tensor with negative dimension -1"),
        ({"head_dim": 0}, "ZeroDivisionError("),
    ],
)
def test_a_config_of_which_no_model_can_be_built_is_refused(
    folder: Path, load_part: LoadPart, change: dict[str, Any], message: str
) -> None:
    change_config(folder, **change)
    refused = refusal(lambda: load_float32(load_part, folder))
    assert refused.startswith(f"config.json describes no model: {message}")
