"""Asks a language model many questions, some at once, and reads its answers or scores solutions."""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lesft.errors import InvalidInput
from lesft.sampling import GREEDY, Sampling
from lesft.seeds import derive_seed
from lesft_client.data.answer_values import is_number, same_answer
from lesft_client.evaluation.benchmark import Question
from lesft_client.evaluation.extraction import (
    READINGS,
    Reading,
    choice_letter,
    read_answer,
)
from lesft_client.evaluation.predictions import Prediction
from lesft_client.evaluation.prompting import Prompt, Solution
from lesft_client.language_model import GenerationRequest

if TYPE_CHECKING:
    from lesft_client.language_model import LanguageModel

Answer = Reading | Literal["letter", "likelihood"]
"""How an answer is read; `likelihood` takes the likeliest letter and has nothing written."""


@dataclass(frozen=True)
class Asked:
    """A question, ready to be asked, its solution to be scored, or both."""

    index: int
    question: Question
    prompt: Prompt | None
    """None where no answer is asked for."""
    solution: Solution | None = None
    """None where it is not to be scored."""

    @property
    def digest(self) -> str:
        """16 hex digits over all token ids; the prompt's own where nothing is to be scored."""
        digests = [each.digest for each in (self.prompt, self.solution) if each is not None]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Manner:
    """How all questions of an evaluation are asked and read."""

    answer: Answer
    max_tokens: int = 256
    sampling: Sampling = GREEDY
    batch: int = 8
    """Questions under way at once."""


def check_lengths(asked: Sequence[Asked], manner: Manner, max_length: int) -> None:
    """Raise InvalidInput unless every prompt and what follows it fit into `max_length` tokens."""
    _check_solutions([each.solution for each in asked if each.solution], max_length)
    prompts = [each.prompt for each in asked if each.prompt]
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if manner.answer == "likelihood":
        needed = max((len(p.ids) + p.longest_continuation for p in prompts), default=0)
    else:
        needed = longest + manner.max_tokens
    if not prompts or needed <= max_length:
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


def _check_solutions(solutions: Sequence[Solution], max_length: int) -> None:
    longest = max((len(s.prompt_ids) + len(s.target_ids) for s in solutions), default=0)
    if longest > max_length:
        raise InvalidInput(
            f"the longest question has {longest} tokens with its solution, but both must fit into "
            f"the model's {max_length}: use fewer --shots, or leave out the longest questions"
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
        if each.prompt is None:
            prediction = _unasked(each)
        elif manner.answer == "likelihood":
            prediction = await _compare_letters(model, each, each.prompt)
        else:
            prediction = await _have_written(model, each, each.prompt, manner)
        if each.solution is not None:
            nll = await solution_nll(model, each.solution)
            scored = {"nll": nll, "nll_tokens": len(each.solution.target_ids)}
            prediction = prediction.model_copy(update=scored)
        on_prediction(prediction)


async def solution_nll(model: "LanguageModel", solution: Solution) -> float:
    """Sum of -log P of a solution's tokens, in nats."""
    from lesft.inference_messages import MAX_PLACES  # imports torch

    nll = 0.0
    # A split model scores so many tokens at a time.
    for start in range(0, len(solution.target_ids), MAX_PLACES):
        before, target = solution.target_ids[:start], solution.target_ids[start:][:MAX_PLACES]
        [score] = await model.score([*solution.prompt_ids, *before], [target])
        nll -= score.log_prob
    return nll


def _unasked(asked: Asked) -> Prediction:
    assert asked.solution is not None, "a question is asked or its solution scored"
    return Prediction(
        index=asked.index,
        prompt=asked.digest,
        expected=asked.question.sample.answer,
        prompt_tokens=len(asked.solution.prompt_ids),
    )


async def _compare_letters(model: "LanguageModel", asked: Asked, prompt: Prompt) -> Prediction:
    continuations = prompt.continuations
    scores = await model.score(prompt.ids, list(continuations.values()))
    log_probs = {
        letter: score.log_prob for letter, score in zip(continuations, scores, strict=True)
    }
    likeliest = max(log_probs, key=log_probs.__getitem__)
    expected = asked.question.sample.answer
    return Prediction(
        index=asked.index,
        prompt=asked.digest,
        expected=expected,
        extracted=likeliest,
        right=likeliest == expected,
        readings={"likelihood": likeliest},
        log_probs=log_probs,
        prompt_tokens=len(prompt.ids),
    )


async def _have_written(
    model: "LanguageModel", asked: Asked, prompt: Prompt, manner: Manner
) -> Prediction:
    sampling = manner.sampling
    if sampling.temperature > 0:
        # A draw depends on seed and position: with one seed for all, the answers' would be linked.
        seed = derive_seed(sampling.seed, "question", asked.index)
        sampling = sampling.model_copy(update={"seed": seed})
    request = GenerationRequest(
        prompt_ids=prompt.ids,
        max_tokens=manner.max_tokens,
        sampling=sampling,
        stop=prompt.stop,
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
        prompt=asked.digest,
        expected=expected,
        extracted=readings[manner.answer],
        right=same_answer(readings[manner.answer], expected),
        readings=readings,
        text=text,
        finish_reason=finish_reason,
        prompt_tokens=len(prompt.ids),
        tokens=tokens,
    )


def read_all(text: str, question: Question, answer: Answer) -> dict[str, str | None]:
    """The answer in a text by every reading of that kind: its letter, or all READINGS."""
    if answer == "letter":
        return {"letter": choice_letter(text, question.choices)}
    numeric = is_number(question.sample.answer)
    return {reading: read_answer(text, reading, numeric) for reading in READINGS}
