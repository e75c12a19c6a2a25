"""LoRA on both parts of the model, and the two halves as one PEFT adapter of the whole."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lesft.adapters import (
    attach_lora,
    check_halves,
    load_lora_state,
    lora_parameters,
    lora_state,
    save_adapter,
)
from lesft.errors import BundleError, InvalidInput, ModelError
from lesft.spec import LoraSpec
from lesft.split import SUPPORTED_FAMILIES, back_hidden, front_forward, head_logits
from lesft.weights import Checkpoint, load_back, load_front
from tests.tiny_models import NUM_LAYERS, mlp_modules, save_tiny_model

CPU = torch.device("cpu")
LORA = LoraSpec(rank=3, alpha=12, dropout=0.25)
MODULES = ("down_proj", "gate_proj", "up_proj")
DOWN_A = "model.layers.{}.mlp.down_proj.lora_A.weight"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "llama")
    return folder


def parts(
    folder: Path, cut_layer: int, lora: LoraSpec = LORA, run_seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedModel]:
    checkpoint = Checkpoint(folder)
    front = load_front(checkpoint, cut_layer, torch.float32, CPU)
    back = load_back(checkpoint, cut_layer, torch.float32, CPU)
    attach_lora(front, lora, run_seed, 0)
    attach_lora(back, lora, run_seed, cut_layer)
    return front, back


def fresh_states(
    folder: Path, cut_layer: int, lora: LoraSpec = LORA, run_seed: int = 0
) -> tuple[State, State]:
    front, back = parts(folder, cut_layer, lora, run_seed)
    return lora_state(front, 0), lora_state(back, cut_layer)


def random_like(state: State, seed: int = 3) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in state.items()}


def expected_names(layers: range) -> set[str]:
    return {
        f"model.layers.{layer}.mlp.{module}.lora_{matrix}.weight"
        for layer in layers
        for module in MODULES
        for matrix in "AB"
    }


def differing(found: Mapping[str, torch.Tensor], expected: State) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


# ---------------------------------------------------------------------- fresh adapters


def test_a_run_seed_gives_the_same_adapter_at_every_cut(folder: Path) -> None:
    wholes = []
    for cut_layer in range(1, NUM_LAYERS):
        front, back = fresh_states(folder, cut_layer)
        assert front.keys() == expected_names(range(cut_layer))
        assert back.keys() == expected_names(range(cut_layer, NUM_LAYERS))
        wholes.append({**front, **back})
    assert differing(wholes[1], wholes[0]) == []
    assert differing(wholes[2], wholes[0]) == []


def test_layers_with_two_digits_have_their_own_names(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", num_hidden_layers=12)
    front, back = fresh_states(tmp_path, 1)
    assert front.keys() == expected_names(range(1))
    assert back.keys() == expected_names(range(1, 12))


def test_another_run_seed_gives_another_a(folder: Path) -> None:
    first, _ = fresh_states(folder, 2, run_seed=0)
    second, _ = fresh_states(folder, 2, run_seed=1)
    assert differing(second, first) == [name for name in first if ".lora_A." in name]


def test_the_state_of_the_random_generator_plays_no_part(folder: Path) -> None:
    torch.manual_seed(1)
    first, _ = fresh_states(folder, 2)
    torch.manual_seed(2)
    second, _ = fresh_states(folder, 2)
    assert differing(second, first) == []


def test_a_fresh_adapter_is_kaiming_uniform_in_a_and_zero_in_b(folder: Path) -> None:
    front, back = fresh_states(folder, 2, LoraSpec(rank=40))
    state = {**front, **back}
    for name, tensor in state.items():
        if ".lora_B." in name:
            assert not tensor.any(), name
        else:
            bound = 1 / math.sqrt(tensor.shape[1])  # with peft's negative slope of sqrt(5)
            assert 0.97 * bound < tensor.abs().max() <= bound, name
            assert abs(tensor.mean()) < 0.06 * bound, name
    matrices = [tensor for name, tensor in state.items() if ".gate_proj.lora_A." in name]
    assert all(not torch.equal(matrices[0], other) for other in matrices[1:])


def test_a_fresh_adapter_changes_no_output(folder: Path) -> None:
    ids_BL = torch.arange(3, 18).unsqueeze(0)
    plain = load_front(Checkpoint(folder), 2, torch.float32, CPU)
    with_adapter, _ = parts(folder, 2)
    assert torch.equal(front_forward(with_adapter, ids_BL), front_forward(plain, ids_BL))


def test_rank_and_alpha_are_those_of_the_spec(folder: Path) -> None:
    front, _ = parts(folder, 2)
    state = random_like(lora_state(front, 0))
    load_lora_state(front, 0, state)
    module = front.get_submodule("layers.1.mlp.down_proj")
    x_ND = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))

    a, b = (state[f"model.layers.1.mlp.down_proj.lora_{matrix}.weight"] for matrix in "AB")
    assert (a.shape, b.shape) == ((3, 48), (32, 3))
    base_ND = module.get_submodule("base_layer")(x_ND)
    expected_ND = base_ND + 12 / 3 * (x_ND @ a.T @ b.T)
    assert torch.allclose(module(x_ND), expected_ND, rtol=1e-5, atol=1e-6)


def test_dropout_is_that_of_the_spec_and_off_until_training(folder: Path) -> None:
    front, _ = parts(folder, 2)
    dropout = front.get_submodule("layers.0.mlp.up_proj.lora_dropout.default")
    ones = torch.ones(100_000)
    assert torch.equal(dropout(ones), ones)

    front.train(True)
    torch.manual_seed(0)
    dropped = dropout(ones)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(dropped[dropped != 0].unique(), torch.tensor([1 / 0.75]))


def test_only_the_adapters_are_trainable(folder: Path) -> None:
    for part in parts(folder, 2):
        trainable = {name for name, p in part.named_parameters() if p.requires_grad}
        assert trainable == {name for name, _ in part.named_parameters() if ".lora_" in name}
        assert len(trainable) == 2 * len(MODULES) * 2


def test_adapters_of_a_bfloat16_part_are_float32(folder: Path) -> None:
    front = load_front(Checkpoint(folder), 2, torch.bfloat16, CPU)
    attach_lora(front, LORA, 0, 0)
    assert {parameter.dtype for parameter in lora_parameters(front)} == {torch.float32}
    expected, _ = fresh_states(folder, 2)
    assert differing(lora_state(front, 0), expected) == []


@pytest.mark.parametrize(
    ("modules", "unknown"),
    [
        (("up_proj", "c_fc"), "c_fc"),
        (("proj", "w1"), "proj, w1"),
        (("lm_head",), "lm_head"),
        (("embed_tokens",), "embed_tokens"),
    ],
)
@pytest.mark.parametrize("load_part", [load_front, load_back])
def test_an_unknown_target_module_is_refused_by_name(
    folder: Path,
    load_part: Callable[[Checkpoint, int, torch.dtype, torch.device], PreTrainedModel],
    modules: tuple[str, ...],
    unknown: str,
) -> None:
    part = load_part(Checkpoint(folder), 2, torch.float32, CPU)
    with pytest.raises(InvalidInput) as caught:
        attach_lora(part, LoraSpec(target_modules=modules), 0, 0)
    assert str(caught.value) == (
        f"lora.target_modules: {unknown} is no linear layer of this model; it has down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    assert lora_parameters(part) == []


# ---------------------------------------------------------------------- states


def test_a_loaded_state_is_read_back_as_it_was(folder: Path) -> None:
    for part, offset in zip(parts(folder, 2), (0, 2), strict=True):
        state = random_like(lora_state(part, offset))
        load_lora_state(part, offset, state)
        assert differing(lora_state(part, offset), state) == []


def test_lora_parameters_are_the_models_own_in_the_order_of_their_names(folder: Path) -> None:
    _, back = parts(folder, 2)
    state = random_like(lora_state(back, 2))
    load_lora_state(back, 2, state)
    in_order = [state[name] for name in sorted(state)]
    for parameter, tensor in zip(lora_parameters(back), in_order, strict=True):
        assert torch.equal(parameter, tensor)


def test_a_state_is_a_copy(folder: Path) -> None:
    front, _ = parts(folder, 2)
    before = {name: tensor.clone() for name, tensor in lora_state(front, 0).items()}
    lora_state(front, 0)[DOWN_A.format(0)].fill_(9.0)
    assert differing(lora_state(front, 0), before) == []

    given = random_like(before)
    load_lora_state(front, 0, given)
    given[DOWN_A.format(0)].fill_(9.0)
    assert not torch.equal(lora_state(front, 0)[DOWN_A.format(0)], given[DOWN_A.format(0)])


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[-1, -1] = math.nan
    return tensor


LAST = "model.layers.3.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop(LAST),
            f"12 tensors expected, got 11; missing: '{LAST}'",
        ),
        (
            lambda state: state.update({"model.layers.9.x": state[LAST]}),
            "12 tensors expected, got 13; not expected: 'model.layers.9.x'",
        ),
        (
            lambda state: state.update({LAST: state[LAST].T.contiguous()}),
            f"tensor '{LAST}' must have shape [48, 3], got [3, 48]",
        ),
        (
            lambda state: state.update({LAST: state[LAST].double()}),
            f"tensor '{LAST}' must be torch.float32, got torch.float64",
        ),
        (
            lambda state: state.update({LAST: with_nan(state[LAST])}),
            f"tensor '{LAST}' has values that are NaN or infinite",
        ),
        (
            lambda state: state.update({LAST: state[LAST] / 0}),
            f"tensor '{LAST}' has values that are NaN or infinite",
        ),
    ],
    ids=["missing", "not expected", "shape", "dtype", "NaN", "infinite"],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    folder: Path, change: Callable[[State], object], message: str
) -> None:
    _, back = parts(folder, 2)
    before = lora_state(back, 2)
    state = random_like(before)
    change(state)
    with pytest.raises(BundleError) as caught:
        load_lora_state(back, 2, state)
    assert str(caught.value) == message
    assert differing(lora_state(back, 2), before) == []


def test_the_other_half_is_refused(folder: Path) -> None:
    front, back = parts(folder, 2)
    with pytest.raises(BundleError, match=f"missing: '{DOWN_A.format(0)}'"):
        load_lora_state(front, 0, lora_state(back, 2))


# ---------------------------------------------------------------------- one adapter of the whole


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
@torch.no_grad()
def test_peft_makes_of_a_saved_adapter_exactly_the_split_model(tmp_path: Path, family: str) -> None:
    cut_layer, ids_BL = 1, torch.arange(3, 18).unsqueeze(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_tiny_model(base, family)
    lora = LORA.model_copy(update={"target_modules": (*mlp_modules(family), "o_proj")})
    front, back = parts(base, cut_layer, lora)
    untrained_LV = head_logits(back, back_hidden(back, front_forward(front, ids_BL))[0])
    front_state = random_like(lora_state(front, 0), seed=1)
    back_state = random_like(lora_state(back, cut_layer), seed=2)
    load_lora_state(front, 0, front_state)
    load_lora_state(back, cut_layer, back_state)

    save_adapter(adapter, {**front_state, **back_state}, lora, str(base))

    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(whole, adapter)
    logits_LV = head_logits(back, back_hidden(back, front_forward(front, ids_BL))[0])
    assert torch.equal(model(input_ids=ids_BL, use_cache=False).logits[0], logits_LV)
    assert not torch.equal(logits_LV, untrained_LV)
    loaded = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    assert len(loaded) == NUM_LAYERS * len(lora.target_modules) * 2
    assert differing(loaded, {**front_state, **back_state}) == []


def test_a_saved_adapter_names_its_model_and_its_settings(folder: Path, tmp_path: Path) -> None:
    lora = LORA.model_copy(update={"target_modules": ("up_proj", "down_proj")})
    front_state, back_state = fresh_states(folder, 3, lora)
    state = {**front_state, **back_state}
    save_adapter(tmp_path / "a" / "b", state, lora, "someone/model")
    config = json.loads((tmp_path / "a" / "b" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/model"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 12, 0.25)
    assert sorted(config["target_modules"]) == ["down_proj", "up_proj"]
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["inference_mode"] is True


@pytest.mark.parametrize(
    ("front_layers", "back_layers", "change", "message"),
    [
        (2, 1, None, f"front and back both hold '{DOWN_A.format(1)}': the cuts do not match"),
        (1, 2, None, f"the halves lack '{DOWN_A.format(1)}': the cuts do not match"),
        (2, 2, DOWN_A.format(0), f"the halves lack '{DOWN_A.format(0)}': the cuts do not match"),
        (2, 2, DOWN_A.format(3), f"the halves lack '{DOWN_A.format(3)}': the cuts do not match"),
        (0, 0, None, "the front's half holds no adapter"),
        (4, 4, None, "the back's half holds no adapter"),
    ],
    ids=["overlap", "gap", "front incomplete", "back incomplete", "no front", "no back"],
)
def test_halves_that_do_not_make_a_whole_are_refused(
    folder: Path,
    front_layers: int,
    back_layers: int,
    change: str | None,
    message: str,
) -> None:
    front_state, back_state = fresh_states(folder, 2)
    whole = {**front_state, **back_state}
    front, back = (
        expected_names(range(front_layers)),
        expected_names(range(back_layers, NUM_LAYERS)),
    )
    with pytest.raises(ModelError) as caught:
        check_halves((front & whole.keys()) - {change}, (back & whole.keys()) - {change})
    assert str(caught.value) == message
