"""The whole model on this machine: what it writes together, what that costs, and its draws."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from lesft.sampling import GREEDY, Sampling
from lesft_client.language_model import GenerationRequest, LanguageModel
from lesft_client.local_batch import RowBatch
from tests.generation.harness import (
    all_written,
    prompts,
    save_family,
    whole_model,
    whole_tokens,
    with_model,
    written,
)

MOSTS = [3, 40, 10, 24, 7, 31, 5, 1, 18, 12]
"""Most tokens of each text: some are over long before others."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens that went through the model in each step, of all rows."""
    seen: list[list[int]] = []
    step = RowBatch.step

    def watched(self: RowBatch, token_ids: Sequence[int]) -> torch.Tensor:
        seen.append(list(token_ids))
        return step(self, token_ids)

    monkeypatch.setattr(RowBatch, "step", watched)
    return seen


async def four_at_once(
    model: LanguageModel, asked: Sequence[list[int]], on_text: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """All texts, the next one begun as soon as another is over."""
    waiting, texts = iter(range(len(asked))), {}

    async def work() -> None:
        for index in waiting:
            texts[index] = await written(model, asked[index], MOSTS[index])
            on_text()

    await asyncio.gather(*(work() for _ in range(4)))
    return [texts[index] for index in range(len(asked))]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_texts_that_come_and_go_are_what_the_library_writes_alone(
    family: str, tmp_path: Path, steps: list[list[int]]
) -> None:
    # The second family has layers with a sliding window, of 4 tokens.
    model = save_family(tmp_path, family)
    asked, whole = prompts(len(MOSTS), seed=4), whole_model(model)
    expected = [whole_tokens(whole, p, most) for p, most in zip(asked, MOSTS, strict=True)]
    assert with_model(lambda m: four_at_once(m, asked), model, local=True) == expected
    # A text's first token comes of its prompt, each of the others of a row of a step: a row that is
    # over costs nothing.
    assert sum(map(len, steps)) == sum(len(ids) - 1 for ids in expected)
    assert max(map(len, steps)) == 4


def test_who_is_written_together_does_not_depend_on_the_clock(
    folder: Path, steps: list[list[int]]
) -> None:
    asked = prompts(len(MOSTS), seed=5)
    with_model(lambda m: four_at_once(m, asked), folder, local=True)
    quick = list(steps)
    steps.clear()
    with_model(lambda m: four_at_once(m, asked, lambda: time.sleep(0.01)), folder, local=True)
    assert steps == quick
    steps.clear()

    async def with_scores(model: Any) -> None:
        async def both(index: int) -> None:
            await model.score(asked[index], [[5, 6, 7]])
            await written(model, asked[index], MOSTS[index])

        await asyncio.gather(*(both(index) for index in range(4)))

    with_model(with_scores, folder, local=True)
    assert len(steps[0]) == 4  # scores go first, and nobody is begun without the others


def test_texts_of_very_different_lengths_are_not_written_together(
    folder: Path, steps: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(model: Any) -> None:
        await asyncio.gather(written(model, [5] * 10, 60), written(model, [7] * 10, 5))

    with_model(work, folder, local=True)
    assert max(map(len, steps)) == 2  # up to 256 tokens all are short
    steps.clear()
    monkeypatch.setattr("lesft_client.local_model._ALIKE", 30)
    with_model(work, folder, local=True)
    assert max(map(len, steps)) == 1


def test_a_text_that_nobody_reads_any_more_ends(folder: Path, steps: list[list[int]]) -> None:
    async def work(model: Any) -> None:
        async with aclosing(model.generate(GenerationRequest([5] * 10, 200))) as pieces:
            await anext(pieces)
        before = len(steps)
        await written(model, [7, 8], 5)
        assert [len(step) for step in steps[before + 2 :]] == [1] * len(steps[before + 2 :])

    with_model(work, folder, local=True)
    assert len(steps) < 100


def test_a_seed_gives_the_same_text_alone_and_among_others(folder: Path) -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=11)
    asked = prompts(4, seed=6)

    async def work(model: LanguageModel) -> Any:
        alone = [await written(model, prompt, 20, sampling) for prompt in asked]
        return alone, await all_written(model, asked, 20, sampling)

    alone, together = with_model(work, folder, local=True)
    assert alone == together
    greedy = with_model(lambda m: all_written(m, asked, 20, GREEDY), folder, local=True)
    assert alone != greedy


def test_the_repetition_penalty_is_the_librarys(folder: Path) -> None:
    asked, whole = prompts(3, seed=7), whole_model(folder)
    sampling = Sampling(repetition_penalty=1.3)
    expected = [whole_tokens(whole, prompt, 20, repetition_penalty=1.3) for prompt in asked]
    assert expected != [whole_tokens(whole, prompt, 20) for prompt in asked]
    got = with_model(lambda m: all_written(m, asked, 20, sampling), folder, local=True)
    assert got == expected


def test_a_failure_reaches_all_whose_texts_it_ends_and_no_later_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, left = RowBatch.step, [3]

    def fails_once(self: RowBatch, token_ids: Sequence[int]) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("no room")
        return step(self, token_ids)

    monkeypatch.setattr(RowBatch, "step", fails_once)
    asked, whole = prompts(3, seed=8), whole_model(folder)

    async def work(model: LanguageModel) -> Any:
        together = [written(model, prompt, 20) for prompt in asked]
        failed = await asyncio.gather(*together, return_exceptions=True)
        return failed, await all_written(model, asked, 20)

    failed, later = with_model(work, folder, local=True)
    assert [str(error) for error in failed] == ["no room"] * 3
    assert later == [whole_tokens(whole, prompt, 20) for prompt in asked]
