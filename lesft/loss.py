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
    probs_T: torch.Tensor | None, hidden_TD: torch.Tensor, spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S_t `[T]` of one sample, and the tokens' classes `[T]` int64 where the weights are adaptive.

    `probs_T` is what the weights are made of: P̃_t where they are adaptive, P_t where they are the
    token's own probability (DFT, arXiv:2508.05629), None where they are uniform. `hidden_TD` are
    the base path's hidden states after the final norm where the tokens are predicted.
    """
    if spec.token_weights == "uniform":
        num_tokens = len(hidden_TD)
        return torch.full((num_tokens,), spec.uniform_weight, device=hidden_TD.device), None
    assert probs_T is not None, "all but uniform weights are made of probabilities"
    probs_T = probs_T.detach().float()
    if spec.token_weights == "probability":
        return probs_T, None
    classes_T = token_classes(probs_T, hidden_TD.detach(), spec)
    return token_weights(probs_T, classes_T, spec), classes_T


def token_weights(
    reference_probs_T: torch.Tensor, classes_T: torch.Tensor, spec: LossSpec
) -> torch.Tensor:
    """S_t by class (eq. 16): 1 to 2 for salient tokens, 0 to 1 for the others."""
    threshold = spec.salient_threshold
    excess_T = ((reference_probs_T - threshold) / (1 - threshold)).clamp(0, 1)
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
    near = _near_any if spec.clustering == "global" else _grown
    near_T = near(hidden_TD.float(), salient_T, spec.cluster_similarity)
    classes_T = torch.full_like(salient_T, TokenClass.IRRELEVANT, dtype=torch.long)
    classes_T[near_T] = TokenClass.SUB_SALIENT
    classes_T[salient_T] = TokenClass.SALIENT
    return classes_T


def _near_any(hidden_TD: torch.Tensor, salient_T: torch.Tensor, similarity: float) -> torch.Tensor:
    """Tokens whose largest cosine similarity to any salient token reaches the threshold."""
    if not bool(salient_T.any()):
        return torch.zeros_like(salient_T)
    unit_TD = F.normalize(hidden_TD, dim=-1)
    cosines_TK = unit_TD @ unit_TD[salient_T].T
    return cosines_TK.amax(dim=1) >= similarity


def _grown(hidden_TD: torch.Tensor, salient_T: torch.Tensor, similarity: float) -> torch.Tensor:
    """Tokens reached from a salient one, first to the left, then to the right.

    The growth goes on while the neighbour's cosine similarity to a running centre reaches the
    threshold; the centre moves to the mean of itself and each neighbour accepted. All salient
    tokens grow side by side, each with a centre of its own.
    """
    near_T = torch.zeros_like(salient_T)
    starts_K = salient_T.nonzero().squeeze(1)
    centres_KD = hidden_TD[starts_K]
    for direction in (-1, 1):
        growing = torch.arange(len(starts_K), device=starts_K.device)  # which of the K still do
        edges = starts_K  # where their growth has come to
        while len(growing):
            edges = edges + direction
            inside = (edges >= 0) & (edges < len(hidden_TD))
            growing, edges = growing[inside], edges[inside]
            near = F.cosine_similarity(centres_KD[growing], hidden_TD[edges]) >= similarity
            growing, edges = growing[near], edges[near]
            near_T[edges] = True
            centres_KD[growing] = (centres_KD[growing] + hidden_TD[edges]) / 2
    return near_T
