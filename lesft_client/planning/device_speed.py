"""What a front costs on this device, measured: real steps of the run's data through two depths.

Of fronts with few layers, whose weights are zeros: what a step takes and keeps does not depend on
them. The two depths tell what a layer costs from what is there whatever the cut.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedConfig, PreTrainedModel

from lesft.adapters import attach_lora, lora_parameters
from lesft.allocator import return_large_blocks
from lesft.device import choose_device, compute_dtype
from lesft.micro_batch import StepKey, StepResult
from lesft.spec import RunSpec
from lesft.split import build_front, checkpoint_gradients
from lesft.weights import load_frugal_front, parse_config
from lesft_client.data import EncodedSample
from lesft_client.front import Front
from lesft_client.planning.hollow_model import hollow_checkpoint
from lesft_client.planning.memory import FrontShape, free_bytes
from lesft_client.planning.settings import PlanSettings

_SHALLOW, _DEEP = 1, 4
"""Layers. The farther apart, the less an error in either weighs at a deep cut."""

_SHARE_OF_MEMORY = 4
"""The deeper front may take one part in so many of the free memory; else it has fewer layers."""

_ENOUGH_SECONDS = 12.0
_FEWEST, _MOST = 3, 24
"""Micro-batches through each depth, unless the first of them have taken long enough."""


class Cost(BaseModel):
    """Something that costs `fixed`, and `layer` for each layer of the front."""

    model_config = ConfigDict(frozen=True)

    fixed: float
    layer: float

    def at(self, cut_layer: int) -> float:
        """At a cut."""
        return self.fixed + cut_layer * self.layer


class DeviceSpeed(BaseModel):
    """Seconds per token, but for the optimizer's, which are those of a step."""

    model_config = ConfigDict(frozen=True)

    forward: Cost
    """With what the backward pass needs kept."""
    backward: Cost
    plain_forward: Cost
    """Without: the reference path, and a front that does not train."""
    optimizer: Cost
    micro_batches: int
    """How many were measured at each depth."""


class _Times(NamedTuple):
    forward: float
    backward: float
    plain_forward: float
    optimizer: float


def measure_device(
    settings: PlanSettings,
    spec: RunSpec,
    config_json: str,
    batches: Sequence[Sequence[EncodedSample]],
    say: Callable[[str], None],
) -> tuple[DeviceSpeed, FrontShape]:
    """Time fronts over these micro-batches, in turns. Raises ModelError for an unusable model."""
    if settings.precision != "fp32" or settings.gradient_checkpointing:
        return_large_blocks()  # as training does then
    device = choose_device(settings.device)
    dtype = compute_dtype(settings.precision, device)
    depths = _depths(parse_config(config_json), dtype, device)
    with tempfile.TemporaryDirectory(prefix="lesft-plan-") as folder:
        checkpoint = hollow_checkpoint(Path(folder), config_json, depths[-1], dtype)
        models = []
        for depth in depths:
            say(f"measuring a front of {depth} {'layers' if depth > 1 else 'layer'}")
            model = load_frugal_front(checkpoint, depth, settings.precision, device)
            attach_lora(model, spec.lora, spec.seed, 0)
            models.append(model)
        fronts = [
            Front(model, _base_path_only(spec), "plan", settings.precision) for model in models
        ]
        shape = _front_shape(fronts, depths, batches[0])
        if settings.gradient_checkpointing:
            for model in models:
                checkpoint_gradients(model)
        return _speed(fronts, depths, batches), shape


def _depths(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> list[int]:
    layers: Any = build_front(config, 1).layers
    layer = sum(parameter.numel() for parameter in layers.parameters()) * dtype.itemsize
    affordable = free_bytes(device) // _SHARE_OF_MEMORY // layer
    deep = min(_DEEP, max(_SHALLOW + 1, affordable), config.num_hidden_layers - 1)
    return sorted({_SHALLOW, deep})


def _base_path_only(spec: RunSpec) -> RunSpec:
    """The paths are timed apart."""
    update = {"token_weights": "uniform", "reference_nll_weight": 0.0, "reference_refresh": 1}
    return spec.model_copy(update={"loss": spec.loss.model_copy(update=update)})


# ---------------------------------------------------------------------- time


def _speed(
    fronts: Sequence[Front], depths: Sequence[int], batches: Sequence[Sequence[EncodedSample]]
) -> DeviceSpeed:
    times: list[list[_Times]] = [[] for _ in fronts]
    began = time.monotonic()
    for number, batch in enumerate(cycle(batches)):
        for front, measured in zip(fronts, times, strict=True):
            taken = _time(front, batch)
            if number:  # the first warms up
                measured.append(taken)
        seconds = time.monotonic() - began
        if number == _MOST or (number >= _FEWEST and seconds > _ENOUGH_SECONDS):
            break
    medians = [_Times(*map(statistics.median, zip(*measured, strict=True))) for measured in times]
    costs = (line(depths, values) for values in zip(*medians, strict=True))
    return DeviceSpeed(**dict(zip(_Times._fields, costs, strict=True)), micro_batches=len(times[0]))


def line(depths: Sequence[int], values: Sequence[float]) -> Cost:
    """The cost whose values at one or two depths these are; neither part is below zero."""
    if len(depths) == 1:
        return Cost(fixed=0, layer=values[0] / depths[0])
    layer = (values[1] - values[0]) / (depths[1] - depths[0])
    layer = min(max(0.0, layer), values[1] / depths[1])
    return Cost(fixed=max(0.0, values[0] - depths[0] * layer), layer=layer)


def _time(front: Front, batch: Sequence[EncodedSample]) -> _Times:
    """One micro-batch through a front, and an optimizer step."""
    moments = [_now(front)]
    forward = front.forward(StepKey(0, 0), batch)
    moments.append(_now(front))
    sent = forward.micro_batch.base.activations_ND
    gradient_ND = torch.zeros_like(sent, device="cpu")
    front.backward(forward, StepResult(StepKey(0, 0), gradient_ND, None, 0.0, 0.0, None))
    moments.append(_now(front))
    front.held_out(batch)
    moments.append(_now(front))
    front.step(0)
    moments.append(_now(front))
    forth, back, plain, step = (after - before for before, after in pairwise(moments))
    return _Times(forth / len(sent), back / len(sent), plain / len(sent), step)


def _now(front: Front) -> float:
    if front.model.device.type == "cuda":
        torch.cuda.synchronize(front.model.device)
    return time.monotonic()


# ---------------------------------------------------------------------- memory


def _front_shape(
    fronts: Sequence[Front], depths: Sequence[int], batch: Sequence[EncodedSample]
) -> FrontShape:
    kept = line(depths, [_kept_bytes(front, batch) for front in fronts])
    weights = line(depths, [_weight_bytes(front.model) for front in fronts])
    adapters = sum(parameter.numel() for parameter in lora_parameters(fronts[0].model))
    hidden = fronts[0].held_out(batch[:1])[0].activations_ND
    return FrontShape(
        layer_bytes=int(weights.layer),
        adapter_parameters=adapters // depths[0],
        kept_bytes=kept.layer,
        hidden_bytes=hidden[:1].nbytes,
    )


def _weight_bytes(model: PreTrainedModel) -> int:
    adapters = {parameter.data_ptr() for parameter in lora_parameters(model)}
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in adapters)


def _kept_bytes(front: Front, batch: Sequence[EncodedSample]) -> float:
    """What the graph of one micro-batch holds, per token; weights do not count."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in front.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        forward = front.forward(StepKey(0, 0), batch)
    return sum(kept.values()) / sum(forward.micro_batch.base.lengths)
