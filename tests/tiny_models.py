"""Tiny random models of every supported family, with every knob of the family off its default.

A knob at its neutral value (a multiplier of 1, a window longer than the text) would let a split
that forgets it pass.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

NUM_LAYERS = 4
VOCAB_SIZE = 97
HIDDEN_SIZE = 32

_SHARED: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

_ALTERNATING = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.0}
_PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 20_000.0, "partial_rotary_factor": 0.5}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 20_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": _LLAMA3_ROPE, "qk_norm": True},
    "arcee": {"mlp_bias": True, "rope_parameters": _LINEAR_ROPE},
    "cohere": {"logit_scale": 0.37, "use_qk_norm": True, "attention_bias": True},
    "ernie4_5": {"use_bias": True, "head_dim": 8},
    "exaone4": {"sliding_window": 4, "layer_types": _ALTERNATING, "sliding_window_pattern": 4},
    "gemma": {"head_dim": 12, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
        "sliding_window": 4,
        "layer_types": _ALTERNATING,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
        "sliding_window": 4,
        "layer_types": _ALTERNATING,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 30_000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "glm4": {"head_dim": 8, "attention_bias": True, "rope_parameters": _PARTIAL_ROPE},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
        "logits_scaling": 2.5,
        "tie_word_embeddings": True,
    },
    "llama": {"rope_parameters": _LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4, "head_dim": 12},
    "olmo2": {"rope_parameters": _LINEAR_ROPE},
    "phi3": {"sliding_window": 4, "rope_parameters": _PARTIAL_ROPE},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "layer_types": _ALTERNATING},
    "qwen3": {
        "head_dim": 12,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": _ALTERNATING,
    },
    "seed_oss": {"head_dim": 12, "attention_bias": True, "attention_out_bias": True},
    "smollm3": {
        "no_rope_layers": [1, 0, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": _ALTERNATING,
        "tie_word_embeddings": True,
    },
    "stablelm": {
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": True,
        "rope_parameters": _PARTIAL_ROPE,
    },
    "starcoder2": {"sliding_window": 4, "use_bias": True, "tie_word_embeddings": True},
}
"""What each family's tiny config has beside the shared sizes."""

# The linear layers of a decoder layer, where they are not gate_proj, up_proj and down_proj.
_MLP_MODULES = {
    "apertus": ("up_proj", "down_proj"),
    "arcee": ("up_proj", "down_proj"),
    "glm4": ("gate_up_proj", "down_proj"),
    "phi3": ("gate_up_proj", "down_proj"),
    "starcoder2": ("c_fc", "c_proj"),
}


def mlp_modules(family: str) -> tuple[str, ...]:
    """The names of a family's linear layers in the MLP, for LoRA."""
    return _MLP_MODULES.get(family, ("gate_proj", "up_proj", "down_proj"))


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A four-layer config of a family, its knobs off their defaults unless `changes` say so."""
    return AutoConfig.for_model(family, **{**_SHARED, **FAMILIES[family], **changes})


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A whole random causal LM in float32 whose every parameter, norms and biases too, is random.

    Values stay near those of the library's own initialisation, so that activations stay sane.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            tiny_config(family, **changes), dtype=torch.float32
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def save_tiny_model(folder: Path, family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write `tiny_model` in Hugging Face layout to `folder`, and return it."""
    model = tiny_model(family, seed, **changes)
    model.save_pretrained(folder)
    return model
