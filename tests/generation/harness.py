"""A tiny model behind a server on a real socket, and the whole of it as the yardstick."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lesft.sampling import GREEDY, Sampling
from lesft_client.language_model import GenerationRequest, LanguageModel
from lesft_client.open_model import open_model
from lesft_client.settings import GenerateSettings
from tests import tiny_models
from tests.processes.harness import save_model_with_tokenizer

T = TypeVar("T")

END = 2
"""The tiny models' end token."""


def save_family(folder: Path, family: str) -> Path:
    """A tiny random model of a family with a tokenizer that fits."""
    save_model_with_tokenizer(folder)
    tiny_models.save_tiny_model(folder, family, vocab_size=300)
    return folder


def whole_model(folder: Path) -> PreTrainedModel:
    """The same model in one piece."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Random prompts of different lengths, in which nothing is repeated but by chance."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]


def whole_tokens(model: PreTrainedModel, prompt: Sequence[int], most: int, **options: Any) -> Any:
    """What the library's own `generate` writes, the end token with it."""
    ids = torch.tensor([list(prompt)])
    settings = {"do_sample": False, "eos_token_id": END, "pad_token_id": 0, **options}
    written = model.generate(ids, max_new_tokens=most, **settings)  # type: ignore[operator]
    return written[0, len(prompt) :].tolist()


async def written(
    model: LanguageModel, prompt: Sequence[int], most: int, sampling: Sampling = GREEDY
) -> list[int]:
    """The tokens of one text."""
    token_ids: list[int] = []
    async with aclosing(model.generate(GenerationRequest(prompt, most, sampling))) as pieces:
        async for piece in pieces:
            token_ids += piece.token_ids
    return token_ids


async def all_written(
    model: LanguageModel, several: Sequence[Sequence[int]], most: int, sampling: Sampling = GREEDY
) -> list[list[int]]:
    """The tokens of several texts, written at the same time."""
    return list(await asyncio.gather(*(written(model, p, most, sampling) for p in several)))


def with_model(work: Callable[[Any], Awaitable[T]], model: Path, **settings: Any) -> T:
    """What `work` makes of the model that the settings mean."""

    async def run() -> T:
        values = {"model": str(model), "threads": 1, "patience_seconds": 20, **settings}
        async with open_model(GenerateSettings(**values)) as opened:
            return await work(opened)

    return asyncio.run(run())
