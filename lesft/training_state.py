"""One side's training state as named tensors: its adapters and its optimizer.

Frozen weights are no part of it. Names are the whole model's behind `lora.`, `exp_avg.` and
`exp_avg_sq.`.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from lesft.adapters import load_lora_state, lora_state, named_lora_parameters
from lesft.errors import BundleError
from lesft.optimizer import Optimizer

_LORA = "lora."


def training_state(
    model: PreTrainedModel, layer_offset: int, optimizer: Optimizer
) -> dict[str, torch.Tensor]:
    """Copies on the CPU of the adapters' tensors and of the optimizer's state."""
    adapters = lora_state(model, layer_offset)
    return {
        **{f"{_LORA}{name}": tensor for name, tensor in adapters.items()},
        **optimizer.state(named_lora_parameters(model, layer_offset)),
    }


def load_training_state(
    model: PreTrainedModel,
    layer_offset: int,
    optimizer: Optimizer,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Go on from a `training_state`; accumulated gradients are dropped.

    Raises BundleError for a state that is not this part's: then nothing has changed.
    """
    adapters = adapter_of(tensors)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_LORA)}
    if "optimizer.steps" not in rest:
        raise BundleError("the training state lacks the tensor 'optimizer.steps'")
    before = lora_state(model, layer_offset)
    load_lora_state(model, layer_offset, adapters)
    try:
        optimizer.load_state(named_lora_parameters(model, layer_offset), rest)
    except BundleError:
        load_lora_state(model, layer_offset, before)
        raise


def adapter_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters' tensors of a `training_state`, under whole-model names."""
    return {
        name.removeprefix(_LORA): tensor
        for name, tensor in tensors.items()
        if name.startswith(_LORA)
    }
