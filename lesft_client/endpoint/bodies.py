"""What requests hold: the fields of OpenAI's API, and two more that vLLM has.

Fields that would change the answer but are not supported are refused; those that would not, such
as `user` and `metadata`, are ignored.

https://platform.openai.com/docs/api-reference
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from lesft.sampling import Sampling
from lesft_client.conversation import Turn

MOST_CHOICES = 16
MOST_TEXTS = 64
"""Written for one request at most."""

Prompts = list[str | list[int]]

_MOST_STOP_STRINGS = 4
_MOST_STOP_CHARACTERS = 1000
_SEEDS = 2**63


def _refused(message: str, *harmless: Any) -> BeforeValidator:
    """A field that must be left out, or hold what leaving it out would mean."""

    def check(value: Any) -> Any:
        if value is None or value in harmless:
            return value
        raise ValueError(message)

    return BeforeValidator(check)


def _text_of(content: Any) -> Any:
    """The text of a message's content, which may come in parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise ValueError(
                f"the model reads text only: a part must have the type 'text' and a text, "
                f"got the type {str(kind)[:40]!r}"
            )
        texts.append(text)
    return "".join(texts)


def _stop_strings(value: Any) -> Any:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > _MOST_STOP_STRINGS:
        raise ValueError(f"must be {_MOST_STOP_STRINGS} strings at most, got {len(strings)}")
    if not all(1 <= len(string) <= _MOST_STOP_CHARACTERS for string in strings):
        raise ValueError(f"each string must have 1 to {_MOST_STOP_CHARACTERS} characters")
    return tuple(strings)


def _prompts(value: Any) -> Any:
    """A list of prompts, each a string or a list of token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and _are_ids(value)):
        return [value]
    each = value if isinstance(value, list) else []
    if not each or not all(
        isinstance(p, str) or (isinstance(p, list) and _are_ids(p)) for p in each
    ):
        raise ValueError(
            "must be a string, a list of strings, a list of token ids or lists of them"
        )
    return each


def _are_ids(value: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in value)


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    include_usage: bool | None = None


class WritingBody(BaseModel):
    """What both ways of asking have in common."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_strings)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="As with vLLM; -1 or 0: all.")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="As with vLLM.")
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    frequency_penalty: Annotated[
        float | None, _refused("is not supported: use repetition_penalty, such as 1.1", 0)
    ] = None
    presence_penalty: Annotated[
        float | None, _refused("is not supported: use repetition_penalty, such as 1.1", 0)
    ] = None
    logit_bias: Annotated[
        dict[str, float] | None, _refused("is not supported: leave it out", {})
    ] = None

    def sampling(self, default_temperature: float, choice: int) -> Sampling:
        """How the tokens of a choice are chosen; each choice has draws of its own.

        Without a seed, each request has other draws.
        """
        seed = secrets.randbelow(_SEEDS) if self.seed is None else self.seed
        given = {
            "temperature": default_temperature if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "repetition_penalty": self.repetition_penalty,
            "seed": (seed + choice) % _SEEDS,
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts of its tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of)]
    tool_calls: Annotated[list[Any] | None, _refused("tools are not supported", [])] = None

    @property
    def turn(self) -> Turn:
        """As chat templates know it; `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


_NO_TOOLS = _refused("tools are not supported: leave them out", [], "none", "auto")


class ChatBody(WritingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Annotated[
        bool | None, _refused("log-probabilities are not given: leave it out", False)
    ] = None
    top_logprobs: Annotated[
        int | None, _refused("log-probabilities are not given: leave it out", 0)
    ] = None
    tools: Annotated[list[Any] | None, _NO_TOOLS] = None
    tool_choice: Annotated[str | None, _NO_TOOLS] = None
    functions: Annotated[list[Any] | None, _NO_TOOLS] = None
    function_call: Annotated[str | None, _NO_TOOLS] = None
    response_format: Annotated[
        dict[str, str] | None,
        _refused(
            "only text is written: leave it out, and ask for a form in words", {"type": "text"}
        ),
    ] = None
    modalities: Annotated[list[str] | None, _refused("must be text only", ["text"])] = None
    audio: Annotated[dict[str, Any] | None, _refused("only text is written: leave it out")] = None

    @property
    def most_tokens(self) -> int | None:
        """Most tokens to write, under whichever of its two names it was given."""
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(WritingBody):
    """POST /v1/completions."""

    prompt: Annotated[Prompts, BeforeValidator(_prompts)]
    echo: bool | None = None
    suffix: Annotated[
        str | None, _refused("the model writes at the end of a text only: leave it out", "")
    ] = None
    logprobs: Annotated[int | None, _refused("log-probabilities are not given: leave it out")] = (
        None
    )
    best_of: int | None = None

    @field_validator("best_of")
    @classmethod
    def _is_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, info.data.get("n") or 1):
            raise ValueError("is not supported: leave it out, and use n")
        return value

    @field_validator("prompt")
    @classmethod
    def _are_not_too_many(cls, value: Prompts, info: ValidationInfo) -> Prompts:
        if len(value) * (info.data.get("n") or 1) > MOST_TEXTS:
            raise ValueError(f"the number of prompts times n must be {MOST_TEXTS} at most")
        return value
