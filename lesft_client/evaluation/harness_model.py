"""A language model for lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    with HarnessModel(open_model(settings)) as model:
        lm_eval.simple_evaluate(model, tasks=["gsm8k"])

Needs `pip install lm-eval`; nothing else of the project imports this file.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval.api.model import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    LM,
)

from lesft.errors import InvalidInput
from lesft.inference_messages import MAX_PLACES
from lesft.sampling import Sampling
from lesft_client.data.encode import encode_text, render_turns
from lesft_client.language_model import GenerationRequest
from lesft_client.model_thread import ModelThread

if TYPE_CHECKING:
    from lesft_client.language_model import LanguageModel

T = TypeVar("T")

_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_MAX_TOKENS = 256


class HarnessModel(LM):  # type: ignore[misc, unused-ignore]
    """Answers the harness's requests, several at once; a context manager that opens the model."""

    def __init__(
        self, opening: "AbstractAsyncContextManager[LanguageModel]", batch: int = 8
    ) -> None:
        """`opening` is what `open_model` returns; `batch` requests are under way at once."""
        super().__init__()
        self._thread = ModelThread(opening)
        self._batch = batch

    def __enter__(self) -> "HarnessModel":
        """Open the model. Raises what opening it raises."""
        self._thread.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Close the model."""
        self._thread.__exit__(*error)

    @property
    def model(self) -> "LanguageModel":
        """The model, once it is open."""
        return self._thread.model

    # ------------------------------------------------------------------ what the harness calls

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A text for each request of `(context, options)`, up to a string of `until` or its end.

        Options are `until`, `max_gen_toks` and its other names, `do_sample`, `temperature`,
        `top_p`, `top_k` and `repetition_penalty`; a context that is too long loses its beginning.
        """
        arguments = [request.args for request in requests]
        texts = self._run([self._write(context, options) for context, options in arguments])
        for argument, text in zip(arguments, texts, strict=True):
            self.cache_hook.add_partial("generate_until", argument, text)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """log P in nats of each continuation after its context, and whether it is the greedy one.

        An empty context stands for a beginning-of-sequence token; one too long loses its beginning.
        """
        arguments = [request.args for request in requests]
        scores = self._run([self._score(*self._encode_pair(*pair)) for pair in arguments])
        for argument, score in zip(arguments, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", argument, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log P in nats of whole texts, each after a beginning-of-sequence token.

        A text longer than the model's context is taken in windows that predict every token once.
        """
        return self._run([self._score_text(*request.args) for request in requests])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text, up to where the model begins to write."""
        if not add_generation_prompt:
            raise InvalidInput(
                "an answer that is begun for the model (gen_prefix) cannot be put into a chat "
                "template here: run this task without --apply_chat_template"
            )
        return render_turns(self.model.tokenizer, chat_history, add_generation_prompt=True)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that `apply_chat_template` uses; empty where it is not asked for."""
        return str(self.model.tokenizer.chat_template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return self.model.name.replace("/", "__")

    # ------------------------------------------------------------------ one request

    async def _write(self, context: str, options: Mapping[str, Any]) -> str:
        max_tokens = _max_tokens(options)
        room = self.model.max_length - max_tokens
        if room < 1:
            raise InvalidInput(
                f"max_gen_toks must be less than the model's {self.model.max_length} tokens of "
                f"prompt and text, got {max_tokens}"
            )
        until = options.get("until") or ()
        request = GenerationRequest(
            prompt_ids=(self._encode(context) or [self._prefix_id])[-room:],
            max_tokens=max_tokens,
            sampling=_sampling(options),
            stop=(until,) if isinstance(until, str) else tuple(until),
        )
        async with aclosing(self.model.generate(request)) as pieces:
            return "".join([piece.text async for piece in pieces])

    async def _score(self, context_ids: list[int], ids: list[int]) -> tuple[float, bool]:
        room = self.model.max_length - len(ids)
        if room < 1:
            raise InvalidInput(
                f"a continuation must have less tokens than the model's {self.model.max_length}, "
                f"got {len(ids)}"
            )
        [score] = await self.model.score(context_ids[-room:], [ids])
        return score.log_prob, score.is_greedy

    async def _score_text(self, text: str) -> float:
        ids = self.model.tokenizer.encode(text, add_special_tokens=False)
        most = min(self.model.max_length, MAX_PLACES)
        scores = [
            await self.model.score(context, [window])
            for context, window in windows(ids, self._prefix_id, most)
        ]
        return sum(score.log_prob for [score] in scores)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, cut where the context's end; its last spaces go to what follows."""
        tokenizer = self.model.tokenizer
        if not context:
            return [self._prefix_id], tokenizer.encode(continuation, add_special_tokens=False)
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        ids = self._encode(context)
        return ids or [self._prefix_id], self._encode(context + continuation)[len(ids) :]

    def _encode(self, text: str) -> list[int]:
        # The text of a chat template brings its own opening tokens.
        bos = self.model.tokenizer.bos_token
        if bos is not None and text.startswith(str(bos)):
            return list(self.model.tokenizer.encode(text, add_special_tokens=False))
        return encode_text(text, self.model.tokenizer)

    @property
    def _prefix_id(self) -> int:
        """The token that stands for nothing before a text."""
        tokenizer = self.model.tokenizer
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        found = next((token_id for token_id in ids if token_id is not None), None)
        if found is None:
            raise InvalidInput(
                "the tokenizer has neither a beginning- nor an end-of-sequence token to score a "
                "text after; set bos_token or eos_token in its tokenizer_config.json"
            )
        return int(found)

    def _run(self, coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """All results in order; an error ends them all."""
        return self._thread.run(_all(list(coroutines), self._batch))


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    waiting = iter(enumerate(coroutines))
    results: dict[int, T] = {}

    async def work() -> None:
        for index, coroutine in waiting:
            results[index] = await coroutine

    workers = [asyncio.create_task(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for coroutine in coroutines:
            coroutine.close()  # those that never had their turn
    return [results[index] for index in range(len(coroutines))]


def windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of context and what follows it, which together have `length` tokens at most.

    Every token is in the second half of one pair. The last pair has as much context as there is
    room for, as the harness wants it.
    """
    all_ids = [prefix, *ids]
    for start in range(1, len(all_ids), length - 1):
        end = min(start + length - 1, len(all_ids))
        yield all_ids[max(0, end - length) : start], all_ids[start:end]


def _max_tokens(options: Mapping[str, Any]) -> int:
    given = [options[name] for name in _MAX_TOKENS_NAMES if options.get(name) is not None]
    return int(given[0]) if given else _DEFAULT_MAX_TOKENS


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Greedy unless the task samples: by a temperature above 0 and no `do_sample: false`."""
    greedy = options.get("do_sample") is False
    names = ("top_p", "top_k", "repetition_penalty")
    given = {name: options[name] for name in names if options.get(name) is not None}
    return Sampling(temperature=0.0 if greedy else options.get("temperature") or 0.0, **given)
