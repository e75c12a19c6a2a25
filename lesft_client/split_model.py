"""A language model whose front is here and whose back is on the server."""

import hashlib
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from transformers import PreTrainedTokenizerBase

from lesft.errors import InvalidInput
from lesft.inference_messages import MAX_PLACES, TokenAt, TokenScore
from lesft.sampling import GREEDY, Sampling
from lesft_client.language_model import (
    FinishReason,
    GenerationRequest,
    Piece,
    Score,
    check_token_ids,
)
from lesft_client.prompt_lookup import Guesser
from lesft_client.split_sequence import SplitContext, SplitSequence, common_length
from lesft_client.text_stream import TextStream

DEFAULT_GUESSES = 8
"""Tokens to guess per round trip, where the likeliest one is always taken."""


class SplitModel:
    """See `LanguageModel`. Use it on one event loop; `close` it at the end.

    Prompts, texts and their token ids stay here, but for the tokens that the server chooses. Where
    the sampling has a repetition penalty, which looks at the prompt, the client chooses instead.
    """

    def __init__(
        self,
        context: SplitContext,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        max_length: int,
        speculate: int | None,
    ) -> None:
        """`speculate` is how many tokens to guess per round trip; None leaves it to the sampling.

        `end_ids` are the tokens that end a text.
        """
        spec, half = context.spec, context.half
        model_name = spec.model_name.rpartition("/")[2]
        self.name = f"{spec.run_id}/{model_name}" if half else f"{model_name}-untuned"
        facts = [
            context.front_fingerprint,
            spec.cut_layer,
            half and half.model_dump(),
            context.trained_by,
            context.decoder.precision,
        ]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.fingerprint = f"sha256:{digest}"
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._context = context
        self._end_ids = end_ids
        self._speculate = speculate
        self._texts = 0
        self.round_trips = 0
        """Answers that the server has given for texts."""
        self.tokens = 0
        """Tokens of these texts."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """See `LanguageModel`."""
        if request.max_tokens < 1:
            raise InvalidInput(f"max_tokens must be at least 1, got {request.max_tokens}")
        self._check(request.prompt_ids, request.max_tokens)
        text = TextStream(self.tokenizer, request.stop, self._end_ids)
        left = request.max_tokens
        async with aclosing(self._tokens(request)) as several:
            async for token_ids in several:
                piece, used, ended = "", 0, False
                while used < min(left, len(token_ids)) and not ended:
                    new, ended = text.add(token_ids[used])
                    piece, used = piece + new, used + 1
                left -= used
                self.tokens += used
                reason: FinishReason | None = "stop" if ended else None
                if left == 0 and not ended:
                    piece, reason = piece + text.finish(), "length"
                yield Piece(piece, tuple(token_ids[:used]), reason)
                if reason is not None:
                    return

    async def _tokens(self, request: GenerationRequest) -> AsyncGenerator[list[int], None]:
        """Tokens without end, one or more at a time."""
        num_prompt = len(request.prompt_ids)
        capacity = num_prompt + request.max_tokens
        sequence = SplitSequence(self._context, request.prompt_ids, capacity, request.sampling)
        most = self._most_guesses(request.sampling)
        guesser = Guesser(most)
        guesses: list[int] = []
        self._texts += 1
        try:
            while True:
                start = time.monotonic()
                chosen = await sequence.next_tokens(guesses)
                right = common_length(guesses, chosen)
                if len(sequence.token_ids) > num_prompt:
                    guesser.learn(len(guesses), right, time.monotonic() - start)
                self.round_trips += 1
                sequence.token_ids += chosen[: right + 1]
                yield chosen[: right + 1]
                left = capacity - len(sequence.token_ids)
                # Guesses of all texts go through the model together: in a crowd each makes fewer.
                share = max(1, most // self._texts)
                guesses = guesser.guesses(sequence.token_ids, min(left - 1, share))
        finally:
            self._texts -= 1
            sequence.close()

    def _most_guesses(self, sampling: Sampling) -> int:
        if self._speculate is not None:
            return self._speculate
        return DEFAULT_GUESSES if sampling.temperature == 0 else 0

    async def score(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Score]:
        """See `LanguageModel`. Continuations of more than 256 tokens are not taken."""
        if not all(1 <= len(ids) <= MAX_PLACES for ids in continuations):
            raise InvalidInput(
                f"continuations must have 1 to {MAX_PLACES} tokens, got "
                f"{', '.join(str(len(ids)) for ids in continuations)}"
            )
        longest = max(map(len, continuations))
        self._check(prompt_ids, longest, [i for ids in continuations for i in ids])
        num_prompt = len(prompt_ids)
        sequence = SplitSequence(self._context, prompt_ids, num_prompt + longest, GREEDY)
        try:
            openings = [TokenAt(num_prompt - 1, ids[0]) for ids in continuations]
            first = await sequence.ask([], scores=openings)
            scores = []
            for ids, opening in zip(continuations, first.scores, strict=True):
                # The continuation's own tokens are guesses, which the next step takes back.
                rest = [TokenAt(num_prompt + i, token_id) for i, token_id in enumerate(ids[1:])]
                reply = await sequence.ask(ids[:-1], scores=rest) if rest else None
                scores.append(_total([opening, *(reply.scores if reply else ())]))
            return scores
        finally:
            sequence.close()

    async def close(self) -> None:
        """End the connection and the thread that computes."""
        try:
            await self._context.connection.close()
        finally:
            await self._context.decoder.close()

    def _check(self, prompt_ids: Sequence[int], more: int, others: Sequence[int] = ()) -> None:
        check_token_ids([*prompt_ids, *others], self._context.decoder.config.vocab_size)
        if len(prompt_ids) + more > self.max_length:
            raise InvalidInput(
                f"prompt and text may have {self.max_length} tokens together, but the prompt has "
                f"{len(prompt_ids)} and {more} were asked for: shorten the prompt or ask for fewer "
                "tokens"
            )


def _total(scores: Sequence[TokenScore]) -> Score:
    log_prob = sum(score.log_prob for score in scores)
    return Score(log_prob, all(score.likeliest for score in scores))
