"""A language model whose answers are written down: for what is built on one."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from transformers import PreTrainedTokenizerBase

from lesft_client.language_model import GenerationRequest, Piece, Score


class FakeLanguageModel:
    """Answers each prompt as `answer` says, a token at a time.

    `requests` are those that came, and `most_at_once` is how many were under way together.
    """

    name = "lesft/fake"
    fingerprint = "sha256:" + "0" * 64

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        answer: Callable[[str], str],
        score: Callable[[str, str], Score] = lambda prompt, continuation: Score(-1.0, False),
        max_length: int = 4096,
        error: Exception | None = None,
    ) -> None:
        """`error` is raised by every call after the first token, if there is one."""
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.requests: list[GenerationRequest] = []
        self.closed_early = 0
        self.most_at_once = 0
        self._answer = answer
        self._score = score
        self._error = error
        self._at_once = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """See `LanguageModel`."""
        self.requests.append(request)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = self._answer(self.tokenizer.decode(list(request.prompt_ids)))
            ends = [answer.find(stop) for stop in request.stop if stop in answer]
            if ends:
                answer = answer[: min(ends)]
            ids = self.tokenizer.encode(answer, add_special_tokens=False)
            for token_id in ids[: request.max_tokens]:
                await asyncio.sleep(0)
                yield Piece(self.tokenizer.decode([token_id]), (token_id,))
                if self._error is not None:
                    raise self._error
            if len(ids) > request.max_tokens:
                yield Piece("", (), "length")
            else:
                yield Piece("", (self.tokenizer.eos_token_id or 0,), "stop")
        except GeneratorExit:
            self.closed_early += 1
            raise
        finally:
            self._at_once -= 1

    async def score(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Score]:
        """See `LanguageModel`."""
        await asyncio.sleep(0)
        prompt = self.tokenizer.decode(list(prompt_ids))
        return [self._score(prompt, self.tokenizer.decode(list(ids))) for ids in continuations]
