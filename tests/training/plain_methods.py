"""The compared methods in plain torch and peft, each client with a whole model: METHOD, 3 to 5.

Written from METHOD alone; shares no code with the engine and does not read its presets. What comes
from outside is the adapter to begin with, the data and the order in which samples are drawn.
Shape letters: T target tokens, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

State = dict[str, torch.Tensor]

CUT = 1
ROUNDS = 5
ACCUMULATION = 2
AGGREGATION_INTERVAL = 2
LEARNING_RATE = 2e-3  # AdamW blows up rounding where a gradient is near zero, by up to this
MAX_GRAD_NORM = 0.1  # bites in some rounds and not in others

# Random tokens have probabilities around 0.01: with these there are classes of every kind.
SALIENT = 0.012
SIMILARITY = 0.2

SALIENT_CLASS, SUB_SALIENT_CLASS, IRRELEVANT_CLASS = range(3)


class Sample(Protocol):
    """Token ids of the base prompt, the reference prompt and the target."""

    @property
    def base_ids(self) -> list[int]: ...
    @property
    def reference_ids(self) -> list[int]: ...
    @property
    def target_ids(self) -> list[int]: ...


Draw = Callable[[int, int, int], int]
"""Client, position, number of its samples: the index of the sample."""

# ---------------------------------------------------------------------- METHOD section 4


@dataclass(frozen=True)
class SampleLoss:
    """One sample's loss with its graph, and its tokens' classes where it has any."""

    loss: torch.Tensor
    classes: list[int] = field(default_factory=list)


Loss = Callable[[Any, Sample], SampleLoss]


def log_probs_and_hidden(
    model: Any, prompt: list[int], target: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """log P `[T]` of the target, and the hidden states `[T, D]` that the head makes it of.

    The library computes the head only where the target tokens are predicted.
    """
    predictors = torch.arange(len(prompt) - 1, len(prompt) + len(target) - 1)
    output = model(
        input_ids=torch.tensor([prompt + target]),
        logits_to_keep=predictors,
        output_hidden_states=True,
    )
    log_probs_TV = torch.log_softmax(output.logits[0], dim=-1)
    hidden_TD = output.hidden_states[-1][0, predictors]  # the last are those after the final norm
    return log_probs_TV[torch.arange(len(target)), torch.tensor(target)], hidden_TD


def weighted(weight: float) -> Loss:
    """-(1/|y|) Σ_t w log P_t: cross-entropy where the weight is one."""

    def loss(model: Any, sample: Sample) -> SampleLoss:
        log_p_T, _ = log_probs_and_hidden(model, sample.base_ids, sample.target_ids)
        return SampleLoss(-(weight * log_p_T).sum() / len(sample.target_ids))

    return loss


def reference_only(model: Any, sample: Sample) -> SampleLoss:
    """Cross-entropy of the target after the reference prompt."""
    log_p_T, _ = log_probs_and_hidden(model, sample.reference_ids, sample.target_ids)
    return SampleLoss(-log_p_T.sum() / len(sample.target_ids))


def own_probability(model: Any, sample: Sample) -> SampleLoss:
    """DFT: cross-entropy scaled by the token's own probability, which is held constant."""
    log_p_T, _ = log_probs_and_hidden(model, sample.base_ids, sample.target_ids)
    return SampleLoss(-(log_p_T.exp().detach() * log_p_T).sum() / len(sample.target_ids))


Near = Callable[[torch.Tensor, list[int]], set[int]]


def adaptive(near: Near) -> Loss:
    """Eq. 12 to 17: weights from the reference path, classes by probability and similarity."""

    def loss(model: Any, sample: Sample) -> SampleLoss:
        target = sample.target_ids
        with torch.no_grad():
            reference_log_p_T, _ = log_probs_and_hidden(model, sample.reference_ids, target)
        log_p_T, hidden_TD = log_probs_and_hidden(model, sample.base_ids, target)
        p_T = reference_log_p_T.exp()
        salient = [t for t in range(len(target)) if p_T[t] > SALIENT]
        sub_salient = sorted(near(hidden_TD.detach(), salient) - set(salient))
        weights_T = (p_T / SALIENT) ** 0.6
        weights_T[sub_salient] = ((p_T / SALIENT) ** 0.3)[sub_salient]
        weights_T[salient] = 1 + ((p_T[salient] - SALIENT) / (1 - SALIENT)) ** 5
        classes = [IRRELEVANT_CLASS] * len(target)
        for members, name in ((sub_salient, SUB_SALIENT_CLASS), (salient, SALIENT_CLASS)):
            for t in members:
                classes[t] = name
        return SampleLoss(-(weights_T * log_p_T).sum() / len(target), classes)

    return loss


def near_any(hidden_TD: torch.Tensor, salient: list[int]) -> set[int]:
    """Global clustering: tokens whose similarity to any salient token reaches the threshold."""
    tokens = range(len(hidden_TD))
    return {t for t in tokens if any(similar(hidden_TD[t], hidden_TD[s]) for s in salient)}


def grown(hidden_TD: torch.Tensor, salient: list[int]) -> set[int]:
    """Contiguous clustering: grown from each salient token to both sides, the centre moving."""
    near = set()
    for start in salient:
        centre = hidden_TD[start]
        for side in (range(start - 1, -1, -1), range(start + 1, len(hidden_TD))):
            for t in side:
                if not similar(centre, hidden_TD[t]):
                    break
                near.add(t)
                centre = (centre + hidden_TD[t]) / 2
    return near


def similar(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the cosine similarity reaches the threshold."""
    return bool((one @ other) / (one.norm() * other.norm()) >= SIMILARITY)


# ---------------------------------------------------------------------- METHOD section 5


@dataclass(frozen=True)
class PlainMethod:
    """A row of the table of systems.

    `split`: one back for all clients, trained on the sum of their losses by their shares of the
    data; if not, each client trains a whole model on its own loss.
    """

    loss: Loss = weighted(1.0)
    split: bool = True
    pooled: bool = False
    trains_front: bool = True
    averages: bool = True


LESFT_LOSS = adaptive(near_any)

PLAIN_METHODS: Mapping[str, PlainMethod] = {
    "lesft": PlainMethod(LESFT_LOSS),
    "splitlora": PlainMethod(),
    "sl": PlainMethod(averages=False),
    "splitfrozen": PlainMethod(trains_front=False, averages=False),
    "fedavg": PlainMethod(split=False),
    "centralized": PlainMethod(split=False, pooled=True, averages=False),
    "lesft-sl": PlainMethod(LESFT_LOSS, averages=False),
    "lesft-fl": PlainMethod(LESFT_LOSS, split=False),
    "base-only": PlainMethod(),
    "reference-only": PlainMethod(reference_only),
    "uniform-0": PlainMethod(weighted(0.0)),
    "uniform-0.25": PlainMethod(weighted(0.25)),
    "uniform-0.5": PlainMethod(weighted(0.5)),
    "uniform-0.75": PlainMethod(weighted(0.75)),
    "uniform-1": PlainMethod(weighted(1.0)),
    "uniform-1.5": PlainMethod(weighted(1.5)),
    "uniform-2": PlainMethod(weighted(2.0)),
    "lesft-contiguous": PlainMethod(adaptive(grown)),
    "dft": PlainMethod(own_probability),
}

# ---------------------------------------------------------------------- METHOD section 3


@dataclass
class Outcome:
    """What came of a training, by client: whole adapters, losses and classes by round."""

    adapters: list[State]
    losses: list[list[float]]
    class_counts: list[list[tuple[int, int, int] | None]]


def whole_model(folder: Path, adapter: State) -> Any:
    """The model in one piece with peft's own wrapper and a given adapter."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, config)
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
    folder: Path,
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
    models = [whole_model(folder, adapter) for _ in data]
    if method.split:
        share_back(models)
    sides = sides_of(models, method)
    losses: list[list[float]] = [[] for _ in data]
    counts: list[list[tuple[int, int, int] | None]] = [[] for _ in data]
    for round_index in range(ROUNDS):
        for client, (model, samples) in enumerate(zip(models, data, strict=True)):
            share = sizes[client] / sum(sizes) if method.split else 1.0
            window, classes = [], []
            for step in range(ACCUMULATION):
                first = (round_index * ACCUMULATION + step) * batch_size
                drawn = [samples[draw(client, first + i, len(samples))] for i in range(batch_size)]
                parts = [method.loss(model, sample) for sample in drawn]
                loss = torch.stack([part.loss for part in parts]).mean()
                (share * loss / ACCUMULATION).backward()
                window.append(loss.item())
                classes += [name for part in parts for name in part.classes]
            losses[client].append(sum(window) / len(window))
            counts[client].append(counted(classes))
        for side in sides:
            side.step()
        done = round_index + 1
        if method.averages and (done % AGGREGATION_INTERVAL == 0 or done == ROUNDS):
            average(models, sizes, method)
    adapters = [{n: p.detach().clone() for n, p in adapter_of(m).items()} for m in models]
    return Outcome(adapters, losses, counts)


def counted(classes: list[int]) -> tuple[int, int, int] | None:
    """Salient, sub-salient and irrelevant tokens, where there are classes."""
    if not classes:
        return None
    salient, sub_salient, irrelevant = (classes.count(name) for name in range(3))
    return salient, sub_salient, irrelevant
