"""The choice of the next token against the library's own logits processors."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lesft.next_token import choose_token, penalize_repetition
from lesft.sampling import GREEDY, Sampling

N = 12
DRAWS = 2000


def random_logits(num_logits: int = N, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(num_logits, generator=torch.Generator().manual_seed(seed))


def library_probs(logits_N: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities that the library draws from, in the order in which it warps."""
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    scores = logits_N[None]
    for warper in warpers:
        scores = warper(torch.tensor([[0]]), scores)
    return scores[0].double().softmax(-1)


def frequencies(logits_N: torch.Tensor, sampling: Sampling, vary: str) -> torch.Tensor:
    """How often each token is chosen, over many seeds or many positions."""
    counts = torch.zeros(len(logits_N), dtype=torch.float64)
    for draw in range(DRAWS):
        if vary == "seed":
            chosen = choose_token(logits_N, sampling.model_copy(update={"seed": draw}), 3)
        else:
            chosen = choose_token(logits_N, sampling, draw)
        counts[chosen] += 1
    return counts / DRAWS


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.85},
        {"temperature": 2.0, "top_k": N + 5},
    ],
)
def test_tokens_are_drawn_as_often_as_the_librarys_probabilities_say(
    options: dict[str, float], vary: str
) -> None:
    logits_N = random_logits()
    sampling = Sampling.model_validate(options)
    expected = library_probs(logits_N, sampling)
    got = frequencies(logits_N, sampling, vary)
    assert not bool(got[expected == 0].any())
    possible = expected > 0
    deviation = (got - expected)[possible] ** 2 / expected[possible]
    freedom = int(possible.sum()) - 1
    # The 99.9th percentile of chi-square, by Wilson and Hilferty's cube.
    part = 2 / (9 * freedom)
    assert DRAWS * float(deviation.sum()) < freedom * (1 - part + 3.09 * math.sqrt(part)) ** 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 50.0, "top_k": 7},
        {"temperature": 50.0, "top_p": 0.6},
        {"temperature": 30.0, "top_p": 0.75, "top_k": 19},
    ],
)
def test_the_possible_tokens_are_the_librarys(options: dict[str, float], seed: int) -> None:
    logits_N = random_logits(40, seed)
    sampling = Sampling.model_validate(options)  # so hot that each possible one comes up
    chosen = {choose_token(logits_N, sampling, position) for position in range(800)}
    assert chosen == set(library_probs(logits_N, sampling).nonzero().flatten().tolist())


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits_N = random_logits(200)
    sampling = Sampling(temperature=1.0, seed=5)

    def draws(seed: int) -> list[int]:
        seeded = sampling.model_copy(update={"seed": seed})
        return [choose_token(logits_N, seeded, position) for position in range(40)]

    first = draws(5)
    torch.manual_seed(99)  # the global generator is not asked
    state = torch.random.get_rng_state()
    assert draws(5) == first
    assert torch.equal(torch.random.get_rng_state(), state)  # and not moved
    assert draws(6) != first
    assert len(set(first)) > 10
    assert choose_token(logits_N, sampling, 17) == first[17]


def test_a_draw_finds_its_token_wherever_it_stands_among_the_logits() -> None:
    logits_N = random_logits(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    for position in range(40):
        sampling = Sampling(temperature=1.2, top_k=20, top_p=0.9, seed=3)
        chosen = choose_token(logits_N, sampling, position)
        assert int(order[choose_token(logits_N[order], sampling, position)]) == chosen


@pytest.mark.parametrize("options", [{"top_p": 1e-9}, {"top_k": 1}, {"top_p": 1e-9, "top_k": 4}])
def test_one_token_remains_where_no_more_are_allowed(options: dict[str, float]) -> None:
    logits_N = random_logits()
    likeliest = int(logits_N.argmax())
    for seed in range(200):
        sampling = Sampling.model_validate({"temperature": 10.0, "seed": seed, **options})
        assert choose_token(logits_N, sampling, 0) == likeliest


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    for place in range(5):
        logits_N = torch.tensor([0.0] * 3 + [1.0] * 6)
        logits_N[place:3] = 1.0
        assert choose_token(logits_N, GREEDY, place) == min(place, 3)


def test_equal_logits_are_drawn_equally_often() -> None:
    got = frequencies(torch.zeros(8), Sampling(temperature=0.7), "seed")
    assert float((got - 1 / 8).abs().max()) < 0.025


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-39, 1e-45, 1e-300])
def test_the_lowest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    logits_N = torch.tensor([1.0, 2.0, 5.0, 0.0, -3.0])
    for seed in range(5):
        sampling = Sampling(temperature=temperature, seed=seed)
        assert choose_token(logits_N, sampling, 0) == 2


def test_logits_as_large_as_they_get_are_drawn_from() -> None:
    logits_N = torch.tensor([-3e38, 3e38, 0.0])
    assert choose_token(logits_N, Sampling(temperature=1.0), 0) == 1
    assert choose_token(torch.tensor([-math.inf, -math.inf, 1.0]), Sampling(temperature=1), 4) == 2


# ---------------------------------------------------------------------- repetition


@pytest.mark.parametrize("penalty", [1.3, 0.7, 10.0])
def test_the_repetition_penalty_is_the_librarys(penalty: float) -> None:
    logits_N = random_logits(30)
    logits_N[4] = 0.0
    seen = [3, 4, 4, 17, 29, 3]
    library = RepetitionPenaltyLogitsProcessor(penalty)
    expected = library(torch.tensor([seen]), logits_N[None].clone())[0]
    ids_N = torch.arange(30)
    assert torch.equal(penalize_repetition(logits_N, ids_N, seen, penalty), expected)
    assert int((expected != logits_N).sum()) == 3  # 3, 17 and 29; 0 stays 0
    # As they come from a server: the largest of them only, in falling order, int32.
    top = logits_N.topk(12)
    got = penalize_repetition(top.values, top.indices.int(), seen, penalty)
    assert torch.equal(got, expected[top.indices])


def test_a_penalty_of_nothing_seen_or_of_1_changes_nothing() -> None:
    logits_N = random_logits()
    assert torch.equal(penalize_repetition(logits_N, torch.arange(N), [], 1.7), logits_N)
    assert torch.equal(penalize_repetition(logits_N, torch.arange(N), [1, 2], 1.0), logits_N)


def test_a_larger_penalty_makes_a_repeated_token_less_likely() -> None:
    logits_N = random_logits()
    got = [
        float(penalize_repetition(logits_N, torch.arange(N), [6], penalty).softmax(-1)[6])
        for penalty in (1.0, 1.2, 2.0, 5.0)
    ]
    assert all(one > other for one, other in pairwise(got))
