"""Asks a language model many questions, some at once, and reads its answers."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lesft.errors import InvalidInput
from lesft.sampling import GREEDY, Sampling
from lesft.seeds import derive_seed
from lesft_client.data.answer_values import number_value, same_answer
from lesft_client.evaluation.benchmark import Question
from lesft_client.evaluation.extraction import (
    READINGS,
    Reading,
    choice_letter,
    read_answer,
)
from lesft_client.evaluation.predictions import Prediction
from lesft_client.evaluation.prompting import Prompt
from lesft_client.language_model import GenerationRequest

if TYPE_CHECKING:
    from lesft_client.language_model import LanguageModel

Answer = Reading | Literal["letter", "likelihood"]
"""How an answer is read; `likelihood` takes the likeliest letter and has nothing written."""


@dataclass(frozen=True)
class Asked:
    """A question, ready to be asked."""

    index: int
    question: Question
    prompt: Prompt


@dataclass(frozen=True)
class Manner:
    """How all questions of an evaluation are asked and read."""

    answer: Answer
    max_tokens: int = 256
    sampling: Sampling = GREEDY
    batch: int = 8
    """Questions under way at once."""


def check_lengths(asked: Sequence[Asked], manner: Manner, max_length: int) -> None:
    """Raise InvalidInput unless every prompt and its answer fit into `max_length` tokens."""
    longest = max(len(each.prompt.ids) for each in asked)
    if manner.answer == "likelihood":
        needed = max(len(each.prompt.ids) + each.prompt.longest_continuation for each in asked)
    else:
        needed = longest + manner.max_tokens
    if needed <= max_length:
        return
    room = max_length - longest
    smaller = f"set --max-tokens to {room} at most, or " if room > 0 else ""
    if manner.answer == "likelihood":
        smaller = ""
    raise InvalidInput(
        f"the longest prompt has {longest} tokens, {needed} with its answer, but prompt and answer "
        f"together must fit into the model's {max_length}: {smaller}use fewer --shots, or leave "
        "out the longest questions"
    )


async def ask(
    model: "LanguageModel",
    asked: Iterable[Asked],
    manner: Manner,
    on_prediction: Callable[[Prediction], None],
) -> None:
    """Ask all questions, `manner.batch` at once, and hand on each answer as it is there.

    Raises what the model raises, once all that was under way is ended.
    """
    waiting = iter(asked)
    workers = [
        asyncio.create_task(_work(model, waiting, manner, on_prediction))
        for _ in range(manner.batch)
    ]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _work(
    model: "LanguageModel",
    waiting: Iterator[Asked],
    manner: Manner,
    on_prediction: Callable[[Prediction], None],
) -> None:
    for each in waiting:
        if manner.answer == "likelihood":
            on_prediction(await _compare_letters(model, each))
        else:
            on_prediction(await _have_written(model, each, manner))


async def _compare_letters(model: "LanguageModel", asked: Asked) -> Prediction:
    continuations = asked.prompt.continuations
    scores = await model.score(asked.prompt.ids, list(continuations.values()))
    log_probs = {
        letter: score.log_prob for letter, score in zip(continuations, scores, strict=True)
    }
    likeliest = max(log_probs, key=log_probs.__getitem__)
    expected = asked.question.sample.answer
    return Prediction(
        index=asked.index,
        prompt=asked.prompt.digest,
        expected=expected,
        extracted=likeliest,
        right=likeliest == expected,
        readings={"likelihood": likeliest},
        text="",
        finish_reason=None,
        log_probs=log_probs,
        prompt_tokens=len(asked.prompt.ids),
        tokens=0,
    )


async def _have_written(model: "LanguageModel", asked: Asked, manner: Manner) -> Prediction:
    sampling = manner.sampling
    if sampling.temperature > 0:
        # A draw depends on seed and position: with one seed for all, the answers' would be linked.
        seed = derive_seed(sampling.seed, "question", asked.index)
        sampling = sampling.model_copy(update={"seed": seed})
    request = GenerationRequest(
        prompt_ids=asked.prompt.ids,
        max_tokens=manner.max_tokens,
        sampling=sampling,
        stop=asked.prompt.stop,
    )
    text, tokens, finish_reason = "", 0, None
    async with aclosing(model.generate(request)) as pieces:
        async for piece in pieces:
            text += piece.text
            tokens += len(piece.token_ids)
            finish_reason = piece.finish_reason
    readings = read_all(text, asked.question, manner.answer)
    expected = asked.question.sample.answer
    return Prediction(
        index=asked.index,
        prompt=asked.prompt.digest,
        expected=expected,
        extracted=readings[manner.answer],
        right=same_answer(readings[manner.answer], expected),
        readings=readings,
        text=text,
        finish_reason=finish_reason,
        log_probs=None,
        prompt_tokens=len(asked.prompt.ids),
        tokens=tokens,
    )


def read_all(text: str, question: Question, answer: Answer) -> dict[str, str | None]:
    """The answer in a text by every reading of that kind: its letter, or all READINGS."""
    if answer == "letter":
        return {"letter": choice_letter(text, question.choices)}
    numeric = number_value(question.sample.answer) is not None
    return {reading: read_answer(text, reading, numeric) for reading in READINGS}
