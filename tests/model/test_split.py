"""Front and back together are the whole model: bit for bit, in float32, for every family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lesft.adapters import attach_lora, load_lora_state, lora_config, lora_parameters, lora_state
from lesft.errors import InvalidInput, ModelError
from lesft.spec import LoraSpec
from lesft.split import (
    SUPPORTED_FAMILIES,
    back_hidden,
    build_back,
    build_front,
    check_cut_layer,
    check_family,
    default_cut_layer,
    front_forward,
    head_logits,
)
from lesft.weights import Checkpoint, load_back, load_front
from tests.tiny_models import (
    FAMILIES,
    NUM_LAYERS,
    VOCAB_SIZE,
    mlp_modules,
    save_tiny_model,
    tiny_config,
)

CPU = torch.device("cpu")
PROMPT_LENGTH, TARGET_LENGTH = 6, 9  # both longer than the tiny models' sliding windows of 4
PREDICTORS = torch.arange(PROMPT_LENGTH - 1, PROMPT_LENGTH + TARGET_LENGTH - 1)
PADDED_LENGTHS = (15, 9, 6)

every_cut = pytest.mark.parametrize("cut_layer", range(1, NUM_LAYERS))


@dataclass(frozen=True)
class Family:
    """A tiny model of one family, on disk and in one piece."""

    checkpoint: Checkpoint
    whole: PreTrainedModel

    def parts(self, cut_layer: int) -> tuple[PreTrainedModel, PreTrainedModel]:
        return (
            load_front(self.checkpoint, cut_layer, torch.float32, CPU),
            load_back(self.checkpoint, cut_layer, torch.float32, CPU),
        )


@dataclass(frozen=True)
class WholeStep:
    """One backward pass of the whole model with peft's own wrapper."""

    lora: LoraSpec
    adapter: dict[str, torch.Tensor]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=SUPPORTED_FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder, request.param)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Family(Checkpoint(folder), whole)


@pytest.fixture(scope="module")
def whole_step(family: Family) -> WholeStep:
    model_type = family.checkpoint.config.model_type
    lora = LoraSpec(
        rank=3, alpha=12, dropout=0.0, target_modules=(*mlp_modules(model_type), "o_proj")
    )
    whole = AutoModelForCausalLM.from_pretrained(family.checkpoint.folder, dtype=torch.float32)
    model = get_peft_model(whole, lora_config(lora))
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():  # B too: at zero it would hide A's gradient
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapter = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    ids_BL = random_ids(1, PROMPT_LENGTH + TARGET_LENGTH)
    logits_TV = model(input_ids=ids_BL, logits_to_keep=PREDICTORS, use_cache=False).logits[0]
    loss = F.cross_entropy(logits_TV, ids_BL[0, PROMPT_LENGTH:])
    loss.backward()
    gradients = {name: gradient_of(parameter) for name, parameter in parameters.items()}
    return WholeStep(lora, adapter, loss.detach(), gradients)


def random_ids(num_rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB_SIZE, (num_rows, length), generator=generator)


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def named_gradients(part: PreTrainedModel, layer_offset: int) -> dict[str, torch.Tensor]:
    names = lora_state(part, layer_offset)
    parameters = lora_parameters(part)
    return {name: gradient_of(p) for name, p in zip(names, parameters, strict=True)}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


# ---------------------------------------------------------------------- parity


def test_every_supported_family_is_tested_and_no_other() -> None:
    assert set(SUPPORTED_FAMILIES) == FAMILIES.keys()


@every_cut
@torch.no_grad()
def test_logits_of_one_sequence_equal_the_whole_models(family: Family, cut_layer: int) -> None:
    ids_BL = random_ids(1, PROMPT_LENGTH + TARGET_LENGTH)
    front, back = family.parts(cut_layer)

    hidden_BLD = back_hidden(back, front_forward(front, ids_BL))

    expected_LV = family.whole(input_ids=ids_BL, use_cache=False).logits[0]
    assert torch.equal(head_logits(back, hidden_BLD[0]), expected_LV)


@every_cut
@torch.no_grad()
def test_logits_of_a_right_padded_batch_equal_the_whole_models(
    family: Family, cut_layer: int
) -> None:
    lengths = torch.tensor(PADDED_LENGTHS)
    mask_BL = (torch.arange(max(PADDED_LENGTHS)) < lengths.unsqueeze(1)).long()
    # Tokens never see the padding after them; a hole before them shows that both parts mask at all.
    mask_BL[0, 3] = 0
    ids_BL = random_ids(len(lengths), max(PADDED_LENGTHS)) * mask_BL
    front, back = family.parts(cut_layer)

    hidden_BLD = back_hidden(back, front_forward(front, ids_BL, mask_BL), mask_BL)
    # Padding goes through the head as well, so that both sides multiply matrices of one shape.
    logits_BLV = head_logits(back, hidden_BLD.flatten(0, 1)).unflatten(0, mask_BL.shape)

    expected_BLV = family.whole(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
    real = mask_BL.bool()
    assert torch.equal(logits_BLV[real], expected_BLV[real])


@every_cut
def test_loss_and_lora_gradients_of_both_sides_equal_the_whole_models(
    family: Family, whole_step: WholeStep, cut_layer: int
) -> None:
    ids_BL = random_ids(1, PROMPT_LENGTH + TARGET_LENGTH)
    front, back = family.parts(cut_layer)
    for part, offset in ((front, 0), (back, cut_layer)):
        attach_lora(part, whole_step.lora, 0, offset)
        own = lora_state(part, offset)
        load_lora_state(part, offset, {name: whole_step.adapter[name] for name in own})

    activations_BLD = front_forward(front, ids_BL)
    received_BLD = activations_BLD.detach().requires_grad_()
    hidden_BLD = back_hidden(back, received_BLD)
    logits_TV = head_logits(back, hidden_BLD[0, PREDICTORS])
    loss = F.cross_entropy(logits_TV, ids_BL[0, PROMPT_LENGTH:])
    loss.backward()
    activations_BLD.backward(received_BLD.grad)

    assert torch.equal(loss, whole_step.loss)
    gradients = {**named_gradients(front, 0), **named_gradients(back, cut_layer)}
    assert differing(gradients, whole_step.gradients) == []
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # `cache` from 5.24 on
@every_cut
@torch.no_grad()
def test_greedy_decoding_with_caches_equals_the_whole_models(
    family: Family, cut_layer: int
) -> None:
    front, back = family.parts(cut_layer)
    front_cache: Any = None
    back_cache: Any = None
    whole_cache: Any = None
    ids_BL = random_ids(1, PROMPT_LENGTH)
    for _ in range(TARGET_LENGTH):
        at_cut = front(input_ids=ids_BL, past_key_values=front_cache, use_cache=True)
        split = back(
            inputs_embeds=at_cut.last_hidden_state, past_key_values=back_cache, use_cache=True
        )
        whole = family.whole(input_ids=ids_BL, past_key_values=whole_cache, use_cache=True)
        front_cache, back_cache = at_cut.past_key_values, split.past_key_values
        whole_cache = whole.past_key_values
        assert torch.equal(split.logits, whole.logits)
        ids_BL = whole.logits[:, -1:].argmax(-1)
    assert len(front_cache.layers) == cut_layer
    assert len(back_cache.layers) == NUM_LAYERS - cut_layer


def test_each_parts_config_describes_its_own_layers() -> None:
    config = tiny_config("smollm3", no_rope_layers=[1, 0, 0, 1])
    front, back = build_front(config, 1).config, build_back(config, 1).config
    assert (front.num_hidden_layers, back.num_hidden_layers) == (1, 3)
    assert front.layer_types == ["sliding_attention"]
    assert back.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert (front.no_rope_layers, back.no_rope_layers) == ([1], [0, 0, 1])
    assert config.num_hidden_layers == NUM_LAYERS


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "mixtral", "gemma3", None])
def test_an_unknown_family_is_refused_with_its_name_and_the_supported_ones(
    model_type: str | None,
) -> None:
    with pytest.raises(ModelError) as caught:
        check_family(model_type)
    assert str(caught.value) == (
        f"model family {model_type!r} is not supported; supported are apertus, arcee, cohere, "
        "ernie4_5, exaone4, gemma, gemma2, gemma3_text, glm4, granite, llama, mistral, olmo2, "
        "phi3, qwen2, qwen3, seed_oss, smollm3, stablelm, starcoder2"
    )


@pytest.mark.parametrize("build", [build_front, build_back])
def test_no_part_of_an_unknown_family_is_built(
    build: Callable[[PreTrainedConfig, int], PreTrainedModel],
) -> None:
    config = AutoConfig.for_model("gpt_neox", num_hidden_layers=NUM_LAYERS)
    with pytest.raises(ModelError, match=r"^model family 'gpt_neox' is not supported"):
        build(config, 1)


@pytest.mark.parametrize("cut_layer", [-1, 0, 24, 25])
def test_a_cut_outside_the_model_is_refused(cut_layer: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_cut_layer(cut_layer, 24)
    assert str(caught.value) == (
        f"cut_layer must lie between 1 and 23 for this 24-layer model, got {cut_layer}"
    )


def test_the_first_and_the_last_cut_that_leave_a_layer_to_each_part_are_taken() -> None:
    check_cut_layer(1, 24)
    check_cut_layer(23, 24)


@pytest.mark.parametrize("build", [build_front, build_back])
@pytest.mark.parametrize("cut_layer", [0, NUM_LAYERS])
def test_no_part_without_a_layer_is_built(
    build: Callable[[PreTrainedConfig, int], PreTrainedModel], cut_layer: int
) -> None:
    with pytest.raises(InvalidInput) as caught:
        build(tiny_config("llama"), cut_layer)
    assert str(caught.value) == (
        f"cut_layer must lie between 1 and 3 for this 4-layer model, got {cut_layer}"
    )


@pytest.mark.parametrize(("num_layers", "cut_layer"), [(2, 1), (4, 1), (7, 1), (24, 6), (30, 7)])
def test_the_default_cut_is_a_quarter_of_the_layers(num_layers: int, cut_layer: int) -> None:
    assert default_cut_layer(num_layers) == cut_layer
