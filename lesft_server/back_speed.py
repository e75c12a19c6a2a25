"""What a training step of some size costs on this server, measured on its own back.

The steps are real ones, of random activations, through copies of the model that share its weights;
nothing stays of them.
"""

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lesft.adapters import lora_parameters
from lesft.back import Back
from lesft.cohort_batch import Part
from lesft.micro_batch import MicroBatch, Path, StepKey, Targets
from lesft.split import base_model

_MOST_CLIENTS = 8
"""Of a larger cohort's step, a part is measured."""

_REPEATS = 3
_ENOUGH_SECONDS = 2.0


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sample of a micro-batch; no reference where the loss needs none."""

    base: tuple[int, ...]
    reference: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class BackSpeed:
    """Seconds of a step of the whole cohort: `fixed`, and `layer` for each decoder layer."""

    fixed_seconds: float
    layer_seconds: float


def measure_back(back: Back, lengths: Lengths) -> BackSpeed:
    """Time steps in which each client brings a micro-batch of these lengths.

    To be called on the device's thread, at any time: gradients that have accumulated stay as they
    are, no optimizer steps, and every step draws its dropout from a seed of its own.
    """
    clients = min(back.spec.clients, _MOST_CLIENTS)
    batch = _random_batch(lengths, back.model)
    parts = [Part(f"measured-{number}", batch, 1 / clients) for number in range(clients)]
    num_layers = len(_layers(back.model))
    back.set_mode(dropout=True)  # a text of the untuned model may have been the last before
    with _gradients_aside(back.model):
        depths = [1, num_layers] if num_layers > 1 else [1]
        seconds = _medians([_shallower(back, depth) for depth in depths], parts)
    layer = seconds[0] if num_layers == 1 else (seconds[1] - seconds[0]) / (num_layers - 1)
    layer = max(0.0, layer)
    scale = back.spec.clients / clients
    return BackSpeed(max(0.0, seconds[0] - layer) * scale, layer * scale)


def _random_batch(lengths: Lengths, model: PreTrainedModel) -> MicroBatch:
    def path(tokens: tuple[int, ...]) -> Path:
        return Path(torch.randn(sum(tokens), model.config.hidden_size), tokens)

    reference = path(lengths.reference) if lengths.reference else None
    targets = Targets(torch.zeros(sum(lengths.targets), dtype=torch.long), lengths.targets)
    return MicroBatch(StepKey(0, 0), path(lengths.base), reference, targets)


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    layers = base_model(model).get_submodule("layers")
    assert isinstance(layers, torch.nn.ModuleList)
    return layers


def _shallower(back: Back, num_layers: int) -> Back:
    """A back that shares this one's weights, with fewer layers; its window never ends."""
    whole, base = copy.copy(back.model), copy.copy(base_model(back.model))
    base._modules = {**base._modules, "layers": _layers(back.model)[:num_layers]}
    whole._modules = {**whole._modules, whole.base_model_prefix: base}
    loss = back.spec.loss.model_copy(update={"reference_refresh": 1})
    spec = back.spec.model_copy(update={"accumulation": 2, "loss": loss})
    return back.with_model(whole, spec)


@contextmanager
def _gradients_aside(model: PreTrainedModel) -> Iterator[None]:
    """The adapters' gradients, and whether there is dropout, are after the block as before."""
    parameters = lora_parameters(model)
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
        model.train(model.training)  # layers are shared with the copies


def _medians(backs: Sequence[Back], parts: Sequence[Part]) -> list[float]:
    """Seconds of a step of each, in turns, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in backs]
    began = time.monotonic()
    for repeat in range(1 + _REPEATS):
        for back, times in zip(backs, seconds, strict=True):
            start = time.monotonic()
            # The losses are numbers: the device has done its work when they are there.
            back.train_step(StepKey(0, 0), parts)
            if repeat:
                times.append(time.monotonic() - start)
        if repeat and time.monotonic() - began > _ENOUGH_SECONDS:
            break
    return [statistics.median(times) for times in seconds]
