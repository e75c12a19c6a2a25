"""LoRA adapters on one part of the model, and the two parts' adapters as one of the whole model.

Names are the whole model's, such as `model.layers.7.mlp.gate_proj.lora_A.weight`, on both sides and
on the wire: a part adds its layer offset when it speaks and takes it off when it listens.
"""

import math
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lesft.errors import InvalidInput, ModelError
from lesft.files import open_to_umask
from lesft.seeds import derive_seed
from lesft.spec import LoraSpec
from lesft.tensors import TensorSpec, check_tensors

_ADAPTER = "default"
_LAYER = re.compile(r"(?<=\blayers\.)\d+")


def attach_lora(model: PreTrainedModel, lora: LoraSpec, run_seed: int, layer_offset: int) -> None:
    """Put fresh float32 adapters on a part whose layer 0 is the whole model's `layer_offset`.

    B is zero and A Kaiming-uniform as peft has it, drawn from a seed per tensor: the same run seed
    gives the same adapter at every cut. Raises InvalidInput for a module that the part lacks.
    """
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)
    } - {"lm_head"}  # frozen, and in no layer
    missing = sorted(set(lora.target_modules) - linear)
    if missing:
        raise InvalidInput(
            f"lora.target_modules: {', '.join(missing)} is no linear layer of this model; it has "
            f"{', '.join(sorted(linear))}"
        )
    inject_adapter_in_model(lora_config(lora), model, adapter_name=_ADAPTER)
    model.train(model.training)  # the new modules' dropout too
    for name, parameter in named_lora_parameters(model, layer_offset).items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            seed = derive_seed(run_seed, "lora", name)
            generator = torch.Generator().manual_seed(seed)
            values = torch.empty(parameter.shape)
            torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(values)


def enable_adapters(model: PreTrainedModel, enabled: bool) -> None:
    """Whether the part computes with its adapters or as it was before `attach_lora`."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)


def lora_config(lora: LoraSpec) -> LoraConfig:
    """The settings as peft has them."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def named_lora_parameters(
    model: PreTrainedModel, layer_offset: int
) -> dict[str, torch.nn.Parameter]:
    """The adapters' parameters under whole-model names, sorted."""
    named = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            whole = _LAYER.sub(lambda match: str(int(match.group()) + layer_offset), name, count=1)
            whole = whole.replace(f".{_ADAPTER}.", ".")
            # A front is a base model, whose names lack the causal LM's prefix.
            named[whole if whole.startswith("model.") else f"model.{whole}"] = parameter
    return dict(sorted(named.items()))


def lora_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The trainable parameters in the order of their names."""
    return list(named_lora_parameters(model, 0).values())


def lora_state(model: PreTrainedModel, layer_offset: int) -> dict[str, torch.Tensor]:
    """Copies of the adapters' tensors: float32, on the CPU, under whole-model names."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in named_lora_parameters(model, layer_offset).items()
    }


def load_lora_state(
    model: PreTrainedModel, layer_offset: int, state: Mapping[str, torch.Tensor]
) -> None:
    """Set the adapters' values. Raises BundleError, changing nothing, unless all of them fit."""
    parameters = named_lora_parameters(model, layer_offset)
    check_tensors(
        state,
        {name: TensorSpec(tuple(p.shape), (torch.float32,)) for name, p in parameters.items()},
    )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def save_adapter(
    folder: Path, state: Mapping[str, torch.Tensor], lora: LoraSpec, base_model_name: str
) -> None:
    """Write the whole model's adapter as peft has it; see `lesft.adapter_halves.join`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = lora_config(lora)
    config.base_model_name_or_path = base_model_name
    config.inference_mode = True
    config.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in sorted(state.items())},
        file,
        metadata={"format": "pt"},
    )
    open_to_umask(file)


def check_halves(front: Set[str], back: Set[str]) -> None:
    """Raises ModelError unless every layer up to the last has the same tensors, in one half."""
    if not front or not back:
        raise ModelError(f"the {'back' if front else 'front'}'s half holds no adapter")
    if overlap := sorted(front & back):
        raise ModelError(f"front and back both hold {overlap[0]!r}: the cuts do not match")
    names = front | back
    layers = range(num_layers(names))
    expected = {name_at(name, layer) for name in names for layer in layers}
    if missing := sorted(expected - names):
        raise ModelError(f"the halves lack {missing[0]!r}: the cuts do not match")


def num_layers(names: Iterable[str]) -> int:
    """Layers of the whole model, as the names of the back's adapters tell; at least 1."""
    return 1 + max((int(n) for name in names for n in _LAYER.findall(name)), default=0)


def layer_of(name: str) -> int:
    """The layer that an adapter's tensor is of."""
    return int(_LAYER.findall(name)[0])


def name_at(name: str, layer: int) -> str:
    """The name that an adapter's tensor has in another layer."""
    return _LAYER.sub(str(layer), name, count=1)
