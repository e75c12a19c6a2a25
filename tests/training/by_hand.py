"""What the engine must equal: METHOD section 4 in Python floats, and training without a batch.

Written from METHOD alone, slowly and in loops; shares no code with the engine but the settings.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lesft.adapters import attach_lora, lora_parameters
from lesft.back import Back
from lesft.cohort_batch import Part
from lesft.device import Precision
from lesft.micro_batch import MicroBatch, Path, StepKey, Targets
from lesft.spec import LossSpec, RunSpec
from lesft.weights import Checkpoint, load_back
from tests.harness import RAW
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

SALIENT, SUB_SALIENT, IRRELEVANT = range(3)

# ---------------------------------------------------------------------- METHOD section 4


@dataclass(frozen=True)
class Tokens:
    """S_t and the class of each token of one sample.

    `margin` is how near any cosine similarity came to the threshold: where it is within rounding,
    two right computations may differ.
    """

    weights: list[float]
    classes: list[int]
    margin: float


def weigh(reference_probs: list[float], hidden: list[list[float]], spec: LossSpec) -> Tokens:
    """The tokens of one sample: classes, then eq. 16."""
    if spec.token_weights == "uniform":
        return Tokens([spec.uniform_weight] * len(hidden), [], math.inf)
    threshold = single(spec.salient_threshold)
    salient = [t for t, p in enumerate(reference_probs) if p > threshold]
    near, margin = near_tokens(hidden, salient, spec)
    weights, classes = [], []
    for t, p in enumerate(reference_probs):
        if t in salient:
            classes.append(SALIENT)
            weights.append(1 + ((p - threshold) / (1 - threshold)) ** spec.gamma_salient)
        elif t in near:
            classes.append(SUB_SALIENT)
            weights.append((p / threshold) ** spec.gamma_sub_salient)
        else:
            classes.append(IRRELEVANT)
            weights.append((p / threshold) ** spec.gamma_irrelevant)
    return Tokens(weights, classes, margin)


def single(value: float) -> float:
    """The float32 nearest to a value: probabilities are float32, and so is their threshold."""
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)


def near_tokens(
    hidden: list[list[float]], salient: list[int], spec: LossSpec
) -> tuple[set[int], float]:
    """The tokens near a salient one, salient or not, and the margin; see `Tokens`."""
    near: set[int] = set()
    margin = math.inf

    def reaches(one: list[float], other: list[float]) -> bool:
        nonlocal margin
        similarity = cosine(one, other)
        margin = min(margin, abs(similarity - spec.cluster_similarity))
        return similarity >= spec.cluster_similarity

    for start in salient:
        if spec.clustering == "global":
            others = [t for t in range(len(hidden)) if t not in salient]
            near |= {t for t in others if reaches(hidden[start], hidden[t])}
            continue
        centre = hidden[start]
        for neighbours in (reversed(range(start)), range(start + 1, len(hidden))):
            for t in neighbours:
                if not reaches(centre, hidden[t]):
                    break
                near.add(t)
                centre = [(c + h) / 2 for c, h in zip(centre, hidden[t], strict=True)]
    return near, margin


def cosine(one: list[float], other: list[float]) -> float:
    """Cosine similarity; a zero vector is similar to nothing."""
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / norms if norms else 0.0


# ---------------------------------------------------------------------- one client's loss


@dataclass(frozen=True)
class PlainPart:
    """One client's micro-batch, sample by sample: no padding, no slices of the logits.

    `loss` has its graph; the activations are its leaves, the reference's only where the loss trains
    them.
    """

    loss: torch.Tensor
    nll: float
    class_counts: tuple[int, int, int] | None
    base: torch.Tensor
    reference: torch.Tensor | None
    margin: float


def plain_part(model: PreTrainedModel, batch: MicroBatch, spec: LossSpec) -> PlainPart:
    """Eq. 17 for one client: the mean over its samples of -(1/|y|) Σ_t S_t log P_t.

    The two plain terms are in it, each with its setting's weight.
    """
    base = batch.base.activations_ND.clone().requires_grad_()
    reference = None
    if batch.reference is not None:
        reference = batch.reference.activations_ND.clone().requires_grad_(spec.trains_reference)
    losses, log_probs, classes, margins = [], [], [], []
    start = reference_start = target_start = 0
    for i, num_targets in enumerate(batch.targets.lengths):
        targets = batch.targets.ids_T[target_start : target_start + num_targets]
        stop = start + batch.base.lengths[i]
        hidden, log_p = plain_forward(model, base[start:stop], targets)
        reference_probs: list[float] = []
        reference_log_p = torch.zeros(num_targets)
        if batch.reference is not None and reference is not None:
            reference_stop = reference_start + batch.reference.lengths[i]
            activations = reference[reference_start:reference_stop]
            _, reference_log_p = plain_forward(model, activations, targets)
            reference_probs = reference_log_p.exp().tolist()
            reference_start = reference_stop
        tokens = weigh(reference_probs, hidden.tolist(), spec)
        loss = torch.zeros(())
        for t in range(num_targets):
            loss = loss - (tokens.weights[t] + spec.base_nll_weight) * log_p[t]
            if spec.reference_nll_weight:
                loss = loss - spec.reference_nll_weight * reference_log_p[t]
        losses.append(loss / num_targets)
        log_probs += log_p.tolist()
        classes += tokens.classes
        margins.append(tokens.margin)
        start, target_start = stop, target_start + num_targets
    counts = classes.count(SALIENT), classes.count(SUB_SALIENT), classes.count(IRRELEVANT)
    return PlainPart(
        loss=torch.stack(losses).mean(),
        nll=-sum(log_probs) / len(log_probs),
        class_counts=counts if classes else None,
        base=base,
        reference=reference if spec.trains_reference else None,
        margin=min(margins),
    )


def plain_forward(
    model: PreTrainedModel, activations: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and log P where the targets of one sample are predicted."""
    hidden = model.model(inputs_embeds=activations.unsqueeze(0)).last_hidden_state[0]
    predicting = hidden[-len(targets) - 1 : -1]
    log_probs = torch.log_softmax(model.lm_head(predicting), dim=-1)
    return predicting, log_probs[torch.arange(len(targets)), targets]


# ---------------------------------------------------------------------- what goes in


def run_spec(**changes: object) -> RunSpec:
    """A spec for the tiny model without dropout."""
    fields: dict[str, object] = {
        "rounds": 10,
        "cut_layer": 1,
        "seed": 7,
        "model_name": "tiny",
        "front_fingerprint": "sha256:0",
        **RAW,
        "lora": {"dropout": 0.0},
        "optimizer": {"learning_rate": 1e-2},
    }
    return RunSpec.model_validate({**fields, **changes})


def make_back(
    checkpoint: Checkpoint,
    spec: RunSpec,
    precision: Precision = "fp32",
    logits_slice: int = 1024,
    most_tokens: int = 0,
) -> Back:
    """A back whose adapters are random on both sides: with B = 0, A would get no gradient."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_back(checkpoint, spec.cut_layer, dtype, torch.device("cpu"))
    attach_lora(model, spec.lora, spec.seed, spec.cut_layer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return Back(model, spec, precision, logits_slice, most_tokens=most_tokens)


def random_part(
    name: str,
    share: float,
    samples: Sequence[tuple[int, int]],
    key: StepKey = StepKey(0, 0),  # noqa: B008  # frozen
    with_reference: bool = True,
) -> Part:
    """Random activations and targets; `samples` are (base length, target length).

    Draws depend on the name and the key alone. The reference prompt is three tokens longer.
    """
    generator = torch.Generator().manual_seed(
        1000 * key.round + 100 * key.micro + sum(name.encode())
    )

    def path(lengths: tuple[int, ...]) -> Path:
        return Path(torch.randn(sum(lengths), HIDDEN_SIZE, generator=generator), lengths)

    lengths = tuple(length for length, _ in samples)
    target_lengths = tuple(target for _, target in samples)
    base, reference = path(lengths), path(tuple(length + 3 for length in lengths))
    ids = torch.randint(3, VOCAB_SIZE, (sum(target_lengths),), generator=generator)
    return Part(
        name,
        MicroBatch(key, base, reference if with_reference else None, Targets(ids, target_lengths)),
        share,
    )
