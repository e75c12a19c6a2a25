"""Caches step by step and padded batches, in front and back of every family."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lesft.decoding import SequenceCache, Step, back_steps, cache_bytes_per_token, front_steps
from lesft.split import back_hidden, front_forward, head_logits
from lesft.weights import Checkpoint, load_back, load_front
from tests.tiny_models import FAMILIES, HIDDEN_SIZE, VOCAB_SIZE, save_tiny_model

CPU = torch.device("cpu")
CUT = 1
SLIDING = ("gemma2", "mistral")
"""A family in which some layers have a window of 4 tokens, and one in which all have."""

Parts = Callable[[str], tuple[PreTrainedModel, PreTrainedModel]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Front and back of a family's tiny model."""

    @cache
    def of(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
        folder: Path = tmp_path_factory.mktemp(family)
        save_tiny_model(folder, family)
        checkpoint = Checkpoint(folder)
        front = load_front(checkpoint, CUT, torch.float32, CPU)
        return front, load_back(checkpoint, CUT, torch.float32, CPU)

    return of


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """Random activations of so many tokens."""
    return torch.randn(count, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def add(back: PreTrainedModel, held: SequenceCache, hidden_QD: torch.Tensor, **how: Any) -> Any:
    """The logits after each of the new tokens of one sequence."""
    return back_steps(back, [Step(held, hidden_QD, **how)], [len(hidden_QD)])[0]


def plain_logits(back: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """The logits after each token of a whole sequence, by one forward without a cache."""
    with torch.no_grad():
        return head_logits(back, back_hidden(back, hidden_ND[None])[0])


# ---------------------------------------------------------------------- the cache of a sequence


@pytest.mark.parametrize("family", ["llama", *SLIDING])
def test_a_tentative_step_counts_only_as_far_as_it_is_kept(parts: Parts, family: str) -> None:
    _, back = parts(family)
    hidden = rows(12)
    for kept in range(5):
        held = SequenceCache(back.config)
        add(back, held, hidden[:5])
        guessed = add(back, held, hidden[5:9], tentative=True)
        assert held.length == 5
        held.keep(kept)
        assert held.length == 5 + kept
        rest = add(back, held, hidden[5 + kept :])
        assert held.length == 12
        expected = plain_logits(back, hidden)
        torch.testing.assert_close(guessed, expected[5:9], atol=1e-5, rtol=0)
        torch.testing.assert_close(rest, expected[5 + kept :], atol=1e-5, rtol=0)


def test_tokens_that_were_not_kept_leave_no_trace(parts: Parts) -> None:
    _, back = parts("mistral")
    hidden = rows(6)
    held = SequenceCache(back.config)
    add(back, held, hidden[:3])
    for seed in range(1, 4):
        add(back, held, rows(4, seed), tentative=True)
        held.keep(0)
    untouched = SequenceCache(back.config)
    add(back, untouched, hidden[:3])
    assert torch.equal(add(back, held, hidden[3:]), add(back, untouched, hidden[3:]))


def test_a_cache_counts_the_memory_of_tentative_tokens_until_they_are_forgotten(
    parts: Parts,
) -> None:
    _, back = parts("llama")
    size = cache_bytes_per_token(back.config, torch.float32)
    held = SequenceCache(back.config)
    sizes = [held.num_bytes]
    add(back, held, rows(3))
    sizes.append(held.num_bytes)
    add(back, held, rows(5), tentative=True)
    sizes.append(held.num_bytes)
    held.keep(2)
    sizes.append(held.num_bytes)
    held.keep(2)  # there is nothing left to keep
    sizes.append(held.num_bytes)
    assert sizes == [0, 3 * size, 8 * size, 5 * size, 5 * size]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_takes_the_memory_that_is_reserved_for_it(parts: Parts, family: str) -> None:
    front, back = parts(family)
    for part in (front, back):
        reserved = cache_bytes_per_token(part.config, torch.float32)
        held = SequenceCache(part.config)
        for num_tokens in (2, 1):  # a window of 4 keeps 3
            if part is front:
                front_steps(front, [Step(held, torch.tensor([5] * num_tokens))])
            else:
                add(back, held, rows(num_tokens))
        assert held.num_bytes == 3 * reserved


@pytest.mark.parametrize("family", SLIDING)
def test_a_full_window_takes_less_than_is_reserved(parts: Parts, family: str) -> None:
    _, back = parts(family)
    windows = [SequenceCache(back.config).window(i) for i in range(back.config.num_hidden_layers)]
    held = SequenceCache(back.config)
    add(back, held, rows(10))
    per_layer = cache_bytes_per_token(back.config, torch.float32) // len(windows)
    assert held.length == 10
    assert held.num_bytes == sum(per_layer * (3 if window else 10) for window in windows)


# ---------------------------------------------------------------------- batches

LENGTHS = (
    ((7, 1, 12, 3), (0, 0, 0, 0)),
    ((1, 6, 2, 1), (0, 2, 2, 0)),
    ((3, 1, 5, 9), (3, 0, 1, 0)),
    ((1, 1, 1, 1), (0, 0, 0, 0)),
)
"""New tokens of four sequences in four steps, and how many of them are guesses, half of them right
and none of these at the end."""


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_padded_batch_is_what_it_is_alone(parts: Parts, family: str) -> None:
    front, back = parts(family)
    ids = torch.randint(3, VOCAB_SIZE, (4, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = front_forward(front, ids)
    logits = [plain_logits(back, hidden_ND) for hidden_ND in whole]
    caches = [(SequenceCache(front.config), SequenceCache(back.config)) for _ in range(4)]
    starts, keep = [0] * 4, [0] * 4
    for sizes, guesses in LENGTHS:
        for (one, other), kept in zip(caches, keep, strict=True):
            one.keep(kept)
            other.keep(kept)
        spans = [slice(s, s + n) for s, n in zip(starts, sizes, strict=True)]
        hidden = front_steps(
            front,
            [
                Step(one, ids[i, span], guesses[i] > 0)
                for i, ((one, _), span) in enumerate(zip(caches, spans, strict=True))
            ],
        )
        got = back_steps(
            back,
            [Step(other, hidden[i], guesses[i] > 0) for i, (_, other) in enumerate(caches)],
            sizes,
        )
        for i, span in enumerate(spans):
            torch.testing.assert_close(hidden[i], whole[i, span], atol=1e-5, rtol=0)
            torch.testing.assert_close(got[i], logits[i][span], atol=1e-5, rtol=0)
        right = [n - g + g // 2 for n, g in zip(sizes, guesses, strict=True)]
        keep = [r if g else 0 for r, g in zip(right, guesses, strict=True)]
        starts = [s + r for s, r in zip(starts, right, strict=True)]
    assert [one.length for one, _ in caches] == [other.length for _, other in caches] == starts


def test_only_the_logits_wanted_come_back_in_the_order_of_the_steps(parts: Parts) -> None:
    _, back = parts("llama")
    several = [rows(4, seed=1), rows(2, seed=2), rows(6, seed=3)]
    steps = [Step(SequenceCache(back.config), hidden_QD) for hidden_QD in several]
    got = back_steps(back, steps, [1, 2, 3])
    assert [len(logits_WV) for logits_WV in got] == [1, 2, 3]
    for hidden_QD, logits_WV in zip(several, got, strict=True):
        expected = plain_logits(back, hidden_QD)[-len(logits_WV) :]
        torch.testing.assert_close(logits_WV, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("family", ["llama", "olmo2", *SLIDING])
def test_a_row_that_is_not_finite_does_not_touch_the_others(
    parts: Parts, family: str, spoilt: float
) -> None:
    _, back = parts(family)

    def run(first: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        caches = [SequenceCache(back.config) for _ in range(3)]

        def step(several: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            steps = [Step(held, new) for held, new in zip(caches, several, strict=True)]
            return back_steps(back, steps, [len(new) for new in several])

        prompts = step([first, rows(5, seed=2), rows(9, seed=3)])
        return prompts, step([rows(1, seed=4), rows(3, seed=5), rows(1, seed=6)])

    for (bad, *others), (good, *expected) in zip(
        run(torch.full((7, HIDDEN_SIZE), spoilt)), run(rows(7, seed=1)), strict=True
    ):
        assert bool(torch.isfinite(good).all())
        assert not torch.equal(bad, good)
        assert all(torch.equal(a, b) for a, b in zip(others, expected, strict=True))
