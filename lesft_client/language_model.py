"""What the endpoint, the chat and the benchmarks ask of a language model, wherever it runs."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from lesft.errors import InvalidInput
from lesft.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]
"""An end token or stop string came; or as many tokens as were allowed."""


@dataclass(frozen=True)
class GenerationRequest:
    """One text to be written."""

    prompt_ids: Sequence[int]
    """Token ids of the prompt, at least one."""
    max_tokens: int
    """Most tokens to write, at least 1; prompt and text together fit into `max_length`."""
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    """Strings that end the text and are not part of it."""


@dataclass(frozen=True)
class Piece:
    """The next piece of a text. All but the last have no `finish_reason`."""

    text: str
    """What may be shown: it is never taken back. May be empty."""
    token_ids: tuple[int, ...]
    """The tokens written since the last piece, an end token among them."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Score:
    """How likely a continuation is."""

    log_prob: float
    """Sum of log P over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one at its place."""


class LanguageModel(Protocol):
    """A causal language model. Any number of calls may be under way at once."""

    name: str
    """What the model is called, such as "lesft/SmolLM2-135M-Instruct"."""
    fingerprint: str
    """`sha256:` and hex digits over all that decides its output: weights, adapters, precision."""
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    """Most tokens of prompt and text together."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """Write a text; closing the generator stops it.

        Raises InvalidInput when prompt and max_tokens do not fit into `max_length`, Busy when the
        server has no room now, and what else ends the session.
        """
        ...

    async def score(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Score]:
        """How likely each continuation, of one token or more, is after the prompt."""
        ...


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidInput unless there are tokens and the model knows them all."""
    if not token_ids:
        raise InvalidInput("a prompt must have at least one token, got none")
    unknown = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if unknown is not None:
        raise InvalidInput(
            f"the prompt has token {unknown}, but the model knows {vocab_size} tokens only: use "
            "its own tokenizer"
        )
