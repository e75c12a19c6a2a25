"""The losses of the compared methods, sample by sample on a whole model: METHOD section 4.

Written from METHOD alone; shares no code with the engine.
Shape letters: T target tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch

# Random tokens have probabilities around 0.01: with these there are classes of every kind, and the
# two clusterings differ.
SALIENT = 0.012
SIMILARITY = 0.6

SALIENT_CLASS, SUB_SALIENT_CLASS, IRRELEVANT_CLASS = range(3)


class Sample(Protocol):
    """Token ids of the base prompt, the reference prompt and the target."""

    @property
    def base_ids(self) -> list[int]: ...
    @property
    def reference_ids(self) -> list[int]: ...
    @property
    def target_ids(self) -> list[int]: ...


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


@cache
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


def adaptive(near: Near, once: bool = False) -> Loss:
    """Eq. 12 to 17: weights from the reference path, classes by probability and similarity.

    With `once`, a sample's probabilities on the reference path are those of its first step.
    """
    first: dict[tuple[int, ...], torch.Tensor] = {}

    def reference(model: Any, sample: Sample) -> torch.Tensor:
        target = sample.target_ids
        with torch.no_grad():
            log_p_T, _ = log_probs_and_hidden(model, sample.reference_ids, target)
        return first.setdefault((*sample.reference_ids, *target), log_p_T) if once else log_p_T

    def loss(model: Any, sample: Sample) -> SampleLoss:
        target = sample.target_ids
        reference_log_p_T = reference(model, sample)
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


CROSS_ENTROPY = weighted(1.0)
LESFT = adaptive(near_any)
LESFT_CONTIGUOUS = adaptive(grown)
