"""The token weights of METHOD section 4 (eq. 12 to 17): pure functions of one sample.

S_t carries no gradient: it is a constant factor of -log P_t. All arithmetic is float32.
Shape letters: T target tokens, K salient ones among them, D width, V vocabulary.
"""

from enum import IntEnum

import torch
import torch.nn.functional as F

from lesft.spec import LossSpec


class TokenClass(IntEnum):
    """What the reference path makes of a target token."""

    SALIENT = 0
    SUB_SALIENT = 1
    IRRELEVANT = 2


def slice_log_probs(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """log P of the target tokens: `[T]` float32, softmax in float32."""
    log_probs_TV = F.log_softmax(logits_TV.float(), dim=-1)
    return log_probs_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1)


def sample_token_weights(
    reference_probs_T: torch.Tensor | None, hidden_TD: torch.Tensor, spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S_t `[T]` of one sample, and the tokens' classes `[T]` int64 where the weights are adaptive.

    `reference_probs_T` is P̃_t, needed when the weights are adaptive; `hidden_TD` are the base
    path's hidden states after the final norm where the tokens are predicted.
    """
    if spec.token_weights == "uniform":
        num_tokens = len(hidden_TD)
        return torch.full((num_tokens,), spec.uniform_weight, device=hidden_TD.device), None
    assert reference_probs_T is not None, "adaptive weights come with a reference path"
    probs_T = reference_probs_T.detach().float()
    classes_T = token_classes(probs_T, hidden_TD.detach(), spec)
    return token_weights(probs_T, classes_T, spec), classes_T


def token_weights(
    reference_probs_T: torch.Tensor, classes_T: torch.Tensor, spec: LossSpec
) -> torch.Tensor:
    """S_t by class (eq. 16): 1 to 2 for salient tokens, 0 to 1 for the others."""
    threshold = spec.salient_threshold
    excess_T = ((reference_probs_T - threshold) / (1 - threshold)).clamp(min=0)
    ratio_T = reference_probs_T / threshold
    return torch.where(
        classes_T == TokenClass.SALIENT,
        1 + excess_T**spec.gamma_salient,
        torch.where(
            classes_T == TokenClass.SUB_SALIENT,
            ratio_T**spec.gamma_sub_salient,
            ratio_T**spec.gamma_irrelevant,
        ),
    )


def token_classes(
    reference_probs_T: torch.Tensor, hidden_TD: torch.Tensor, spec: LossSpec
) -> torch.Tensor:
    """Each token's `TokenClass`, int64: salient is strictly above the threshold."""
    salient_T = reference_probs_T > spec.salient_threshold
    unit_TD = F.normalize(hidden_TD.float(), dim=-1)
    if spec.clustering == "global":
        near_T = _near_any(unit_TD, salient_T, spec.cluster_similarity)
    else:
        near_T = _grown(hidden_TD.float(), salient_T, spec.cluster_similarity)
    classes_T = torch.full_like(salient_T, TokenClass.IRRELEVANT, dtype=torch.long)
    classes_T[near_T] = TokenClass.SUB_SALIENT
    classes_T[salient_T] = TokenClass.SALIENT
    return classes_T


def _near_any(unit_TD: torch.Tensor, salient_T: torch.Tensor, similarity: float) -> torch.Tensor:
    """Tokens whose largest cosine similarity to any salient token reaches the threshold."""
    if not bool(salient_T.any()):
        return torch.zeros_like(salient_T)
    cosines_TK = unit_TD @ unit_TD[salient_T].T
    return cosines_TK.amax(dim=1) >= similarity


def _grown(hidden_TD: torch.Tensor, salient_T: torch.Tensor, similarity: float) -> torch.Tensor:
    """Tokens reached from a salient one, first to the left, then to the right.

    The growth goes on while the neighbour's cosine similarity to a running centre reaches the
    threshold; the centre moves to the mean of itself and each neighbour accepted.
    """
    hidden_TD = hidden_TD.cpu()
    near_T = torch.zeros(len(hidden_TD), dtype=torch.bool)
    for start in salient_T.nonzero().flatten().tolist():
        centre_D = hidden_TD[start]
        for neighbours in (range(start - 1, -1, -1), range(start + 1, len(hidden_TD))):
            for position in neighbours:
                neighbour_D = hidden_TD[position]
                if float(F.cosine_similarity(centre_D, neighbour_D, dim=0)) < similarity:
                    break
                near_T[position] = True
                centre_D = (centre_D + neighbour_D) / 2
    return near_T.to(salient_T.device)
