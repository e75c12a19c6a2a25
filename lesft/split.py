"""Cutting a decoder in two: the front is the base model's first layers, the back the causal LM's
rest.

Each part runs the library's own forward, which does masks, rotary positions and caches; there is no
layer loop of ours. In float32 front and back together equal the whole model bit for bit.
Shape letters: B sequences, L tokens each, N tokens, D width, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from lesft.errors import InvalidInput, ModelError

SUPPORTED_FAMILIES = (
    *("apertus", "arcee", "cohere", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text"),
    *("glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "seed_oss"),
    *("smollm3", "stablelm", "starcoder2"),
)
"""Values of `model_type` that the parity test covers."""

# Config entries with one item per decoder layer.
_PER_LAYER = ("layer_types", "no_rope_layers")


def check_family(model_type: object) -> None:
    """Raises ModelError for a family whose parity is not proven."""
    if model_type not in SUPPORTED_FAMILIES:
        raise ModelError(
            f"model family {model_type!r} is not supported; supported are "
            f"{', '.join(SUPPORTED_FAMILIES)}"
        )


def check_cut_layer(cut_layer: int, num_layers: int) -> None:
    """Raises InvalidInput unless both parts get at least one layer."""
    if not 1 <= cut_layer < num_layers:
        raise InvalidInput(
            f"cut_layer must lie between 1 and {num_layers - 1} for this {num_layers}-layer model, "
            f"got {cut_layer}"
        )


def check_personal_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raises InvalidInput unless they are some of the `num_layers` layers that a client trains."""
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong:
        raise InvalidInput(
            f"personal_layers must lie between 0 and {num_layers - 1}, the layers that a client "
            f"trains, got {wrong[0]}"
        )
    if len(set(layers)) == num_layers:
        raise InvalidInput(
            f"personal_layers must leave a layer to average, got all {num_layers} that a client "
            "trains: turn aggregate off instead"
        )


def default_cut_layer(num_layers: int) -> int:
    """A quarter of the layers (METHOD section 1)."""
    return max(1, num_layers // 4)


def build_front(
    config: PreTrainedConfig, cut_layer: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Base model with `layers[:cut_layer]` and no final norm; parameters on the meta device."""
    base: Any = base_model(_build_whole(config, cut_layer, dtype))
    base.layers = base.layers[:cut_layer]
    base.norm = torch.nn.Identity()
    _slice_config(base.config, 0, cut_layer)
    return base  # type: ignore[no-any-return]


def build_back(
    config: PreTrainedConfig, cut_layer: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Causal LM with `layers[cut_layer:]` and no embedding; parameters on the meta device."""
    model = _build_whole(config, cut_layer, dtype)
    base: Any = base_model(model)
    base.layers = base.layers[cut_layer:]
    base.embed_tokens = torch.nn.Identity()  # fed through inputs_embeds; peft looks for a module
    if hasattr(base, "embedding_multiplier"):
        base.embedding_multiplier = 1.0  # granite scales whatever it is fed; the front did already
    _slice_config(model.config, cut_layer, len(base.layers) + cut_layer)
    for index, layer in enumerate(base.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # the place of this layer's keys and values in a cache
    return model


def _build_whole(config: PreTrainedConfig, cut_layer: int, dtype: torch.dtype) -> PreTrainedModel:
    check_family(config.model_type)
    check_cut_layer(cut_layer, config.num_hidden_layers)
    # Buffers are real: rotary frequencies are in no checkpoint and must be computed; in the dtype
    # asked for, since some (Gemma's scale of the embedding) are rounded to it.
    with init_empty_weights(include_buffers=False):
        try:
            return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return,no-untyped-call]
                copy.deepcopy(config), dtype=dtype
            )
        except Exception as error:  # the library raises whatever a senseless value leads to
            raise ModelError(f"config.json describes no model: {error!r}") from None


def _slice_config(config: PreTrainedConfig, start: int, stop: int) -> None:
    config.num_hidden_layers = stop - start
    for name in _PER_LAYER:
        if getattr(config, name, None) is not None:
            setattr(config, name, list(getattr(config, name))[start:stop])


def base_model(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder of a causal LM, without its head."""
    base = getattr(model, model.base_model_prefix)
    assert isinstance(base, torch.nn.Module)
    return base


def checkpoint_gradients(half: PreTrainedModel) -> None:
    """Keep each layer's input only for the backward pass, which computes the rest again.

    To the same bits, dropout included. Takes a third more time for a fraction of the memory.
    """
    older: Any = half.gradient_checkpointing_enable  # transformers has renamed it, and warns
    getattr(half, "activation_checkpointing_enable", older)({"use_reentrant": False})


def front_forward(
    front: PreTrainedModel, ids_BL: torch.Tensor, mask_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """Cut-layer activations `[B, L, D]`; `mask_BL` is 1 where right-padded rows hold tokens."""
    output = front(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
    hidden_BLD: torch.Tensor = output.last_hidden_state
    return hidden_BLD


def back_hidden(
    back: PreTrainedModel, activations_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden states `[B, L, D]` after the final norm, from cut-layer activations."""
    output = base_model(back)(
        inputs_embeds=activations_BLD, attention_mask=mask_BL, use_cache=False
    )
    hidden_BLD: torch.Tensor = output.last_hidden_state
    return hidden_BLD


def head_logits(back: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits `[N, V]` of hidden states that have passed the final norm.

    Runs the causal LM's own forward around them, with its scaling and capping of logits.
    """
    head = copy.copy(back)
    head._modules = {**back._modules, back.base_model_prefix: _Passed()}
    logits_NV: torch.Tensor = head(inputs_embeds=hidden_ND.unsqueeze(0), use_cache=False).logits
    return logits_NV.squeeze(0)


class _Passed(torch.nn.Module):
    """Stands in for a base model whose work is done."""

    def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)
