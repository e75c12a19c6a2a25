"""The next token from logits: the pure mathematics of `Sampling`."""

from collections.abc import Sequence

import torch

from lesft.sampling import Sampling
from lesft.seeds import derive_seed


def choose_token(logits_N: torch.Tensor, sampling: Sampling, position: int) -> int:
    """The index of the token chosen among N, from float32 logits in any order.

    `position` is the token's place in its sequence, from 0: with the seed it decides the draw.
    Temperature goes before top-k, and top-k before top-p, as in transformers.
    """
    if sampling.temperature == 0:
        return int(logits_N.argmax())
    scores = logits_N.cpu().double()
    scores, order = ((scores - scores.max()) / sampling.temperature).sort(
        descending=True, stable=True
    )
    if sampling.top_k:
        scores = scores[: sampling.top_k]
    probs = scores.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs[before < sampling.top_p]
    generator = torch.Generator().manual_seed(derive_seed(sampling.seed, "token", position))
    cumulative = probs.cumsum(-1)
    draw = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    place = int(torch.searchsorted(cumulative, draw, right=True))
    return int(order[min(place, len(probs) - 1)])


def penalize_repetition(
    logits_N: torch.Tensor, token_ids_N: torch.Tensor, seen: Sequence[int], penalty: float
) -> torch.Tensor:
    """Logits of the tokens named, those seen before made less likely by a penalty above 1.

    Positive logits are divided by it and negative ones multiplied (CTRL, arXiv 1909.05858).
    """
    was_seen_N = torch.isin(token_ids_N, torch.tensor(sorted(set(seen))))
    penalized_N = torch.where(logits_N > 0, logits_N / penalty, logits_N * penalty)
    return torch.where(was_seen_N, penalized_N, logits_N)
