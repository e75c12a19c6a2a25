"""The compared methods in plain torch and peft, each client with a whole model: METHOD, 3 and 5.

Written from METHOD alone; shares no code with the engine and does not read its presets. What comes
from outside is the adapter to begin with, the data and the order in which samples are drawn.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.training.plain_losses import (
    CROSS_ENTROPY,
    LESFT,
    LESFT_CONTIGUOUS,
    Loss,
    Sample,
    SampleLoss,
    adaptive,
    near_any,
    own_probability,
    reference_only,
    weighted,
)

State = dict[str, torch.Tensor]

CUT = 1
ROUNDS = 5
ACCUMULATION = 2
AGGREGATION_INTERVAL = 2
LEARNING_RATE = 2e-3  # AdamW blows up rounding where a gradient is near zero, by up to this
MAX_GRAD_NORM = 0.3  # with several clients, it is exceeded in some rounds and not in others

Draw = Callable[[int, int, int], int]
"""Client, position, number of its samples: the index of the sample."""

# ---------------------------------------------------------------------- METHOD section 5


@dataclass(frozen=True)
class PlainMethod:
    """A row of the table of systems.

    `split`: one back for all clients, trained on the sum of their losses by their shares of the
    data; if not, each client trains a whole model on its own loss.
    """

    loss: Loss = CROSS_ENTROPY
    reference_once: bool = False
    split: bool = True
    pooled: bool = False
    trains_front: bool = True
    averages: bool = True


PLAIN_METHODS: Mapping[str, PlainMethod] = {
    "lesft": PlainMethod(LESFT),
    "splitlora": PlainMethod(),
    "sl": PlainMethod(averages=False),
    "splitfrozen": PlainMethod(trains_front=False, averages=False),
    "fedavg": PlainMethod(split=False),
    "centralized": PlainMethod(split=False, pooled=True, averages=False),
    "lesft-sl": PlainMethod(LESFT, averages=False),
    "lesft-fl": PlainMethod(LESFT, split=False),
    "base-only": PlainMethod(),
    "reference-only": PlainMethod(reference_only),
    "uniform-0": PlainMethod(weighted(0.0)),
    "uniform-0.25": PlainMethod(weighted(0.25)),
    "uniform-0.5": PlainMethod(weighted(0.5)),
    "uniform-0.75": PlainMethod(weighted(0.75)),
    "uniform-1": PlainMethod(CROSS_ENTROPY),
    "uniform-1.5": PlainMethod(weighted(1.5)),
    "uniform-2": PlainMethod(weighted(2.0)),
    "lesft-contiguous": PlainMethod(LESFT_CONTIGUOUS),
    "lesft-once": PlainMethod(LESFT, reference_once=True),
    "dft": PlainMethod(own_probability),
}

# ---------------------------------------------------------------------- METHOD section 3


@dataclass
class Outcome:
    """What came of a training, by client: whole adapters, losses and classes by round."""

    adapters: list[State]
    losses: list[list[float]]
    class_counts: list[list[tuple[int, int, int] | None]]


def with_adapter(base: Any, adapter: State) -> Any:
    """A copy of the whole model in peft's own wrapper, with a given adapter."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(copy.deepcopy(base), config)
    parameters = adapter_of(model)
    assert parameters.keys() == adapter.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter[name])
    return model


def adapter_of(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters under the names that exported adapters have, sorted."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in sorted(model.named_parameters())
        if ".lora_" in name
    }


def is_front(name: str) -> bool:
    return any(f".layers.{layer}." in name for layer in range(CUT))


def share_back(models: Sequence[Any]) -> None:
    """Give all models the first one's adapters behind the cut, the very same parameters."""
    backs = [{n: p for n, p in adapter_of(m).items() if not is_front(n)} for m in models]
    for model, back in zip(models[1:], backs[1:], strict=True):
        replaced = {id(back[name]): backs[0][name] for name in back}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in replaced:
                    setattr(module, name, replaced[id(parameter)])


class Side:
    """A set of adapters with a gradient norm and an AdamW of their own."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._adamw = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
        self._adamw.step()
        self._adamw.zero_grad()


def sides_of(models: Sequence[Any], method: PlainMethod) -> list[Side]:
    """What is clipped and stepped by itself: each client's front, and each back there is."""
    fronts = [[p for n, p in adapter_of(m).items() if is_front(n)] for m in models]
    backs = [[p for n, p in adapter_of(m).items() if not is_front(n)] for m in models]
    if not method.trains_front:
        for front in fronts:
            for parameter in front:
                parameter.requires_grad_(False)
        fronts = []
    return [Side(side) for side in (*fronts, *(backs[:1] if method.split else backs))]


def average(models: Sequence[Any], sizes: Sequence[int], method: PlainMethod) -> None:
    """Eq. 10 and 11: the |D_i|-weighted mean of each matrix that every client has for itself."""
    adapters = [adapter_of(model) for model in models]
    with torch.no_grad():
        for name in adapters[0]:
            if is_front(name) or not method.split:
                own = [adapter[name] for adapter in adapters]
                terms = [size * p.double() for size, p in zip(sizes, own, strict=True)]
                mean = torch.stack(terms).sum(0) / sum(sizes)
                for parameter in own:
                    parameter.copy_(mean)


def train_plainly(
    method: PlainMethod,
    base: Any,
    adapter: State,
    data: Sequence[Sequence[Sample]],
    draw: Draw,
) -> Outcome:
    """Training as anyone would write it with peft and torch, client by client and step by step.

    A pooled method's one client takes as many samples a step as the clients would together.
    """
    batch_size = len(data) if method.pooled else 1
    data = [[sample for samples in data for sample in samples]] if method.pooled else data
    sizes = [len(samples) for samples in data]
    models = [with_adapter(base, adapter) for _ in data]
    if method.split:
        share_back(models)
    sides = sides_of(models, method)
    loss_of = adaptive(near_any, once=True) if method.reference_once else method.loss
    outcome = Outcome([], [[] for _ in data], [[] for _ in data])
    for round_index in range(ROUNDS):
        for client, (model, samples) in enumerate(zip(models, data, strict=True)):
            share = sizes[client] / sum(sizes) if method.split else 1.0
            window = []
            for step in range(ACCUMULATION):
                first = (round_index * ACCUMULATION + step) * batch_size
                drawn = [samples[draw(client, first + i, len(samples))] for i in range(batch_size)]
                parts = [loss_of(model, sample) for sample in drawn]
                loss = torch.stack([part.loss for part in parts]).mean()
                torch.autograd.backward(share * loss / ACCUMULATION)
                window += parts
            outcome.losses[client].append(mean_loss(window))
            outcome.class_counts[client].append(class_counts(window))
        for side in sides:
            side.step()
        done = round_index + 1
        if method.averages and (done % AGGREGATION_INTERVAL == 0 or done == ROUNDS):
            average(models, sizes, method)
    outcome.adapters = [
        {n: p.detach().clone() for n, p in adapter_of(model).items()} for model in models
    ]
    return outcome


def mean_loss(window: Sequence[SampleLoss]) -> float:
    """Of a round, in nats."""
    return sum(part.loss.item() for part in window) / len(window)


def class_counts(window: Sequence[SampleLoss]) -> tuple[int, int, int] | None:
    """Salient, sub-salient and irrelevant tokens of a round, where there are classes."""
    classes = [name for part in window for name in part.classes]
    if not classes:
        return None
    salient, sub_salient, irrelevant = (classes.count(name) for name in range(3))
    return salient, sub_salient, irrelevant
