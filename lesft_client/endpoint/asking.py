"""From the body of a request to what the model is asked, or to why it is not."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lesft.errors import InvalidInput
from lesft_client.conversation import encode_bare, encode_turns
from lesft_client.endpoint.bodies import ChatBody, CompletionBody, WritingBody
from lesft_client.endpoint.errors import Refused
from lesft_client.language_model import GenerationRequest, LanguageModel

_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own default for plain completions."""


@dataclass(frozen=True)
class Defaults:
    """For what a request does not say."""

    temperature: float = 1.0
    max_tokens: int = 0
    """Most tokens of a chat's answer; 0 is what fits."""


@dataclass(frozen=True)
class Asked:
    """All choices of the first prompt, then those of the second, and so on."""

    requests: list[GenerationRequest]
    prefixes: list[str]
    """What each choice begins with before the model has written."""
    num_tokens: int
    """Tokens of all prompts."""


def ask_chat(body: ChatBody, model: LanguageModel, defaults: Defaults) -> Asked:
    """The next turn of a conversation. Raises Refused when the model cannot be asked that."""
    turns = [message.turn for message in body.messages]
    _check_length(model, sum(len(turn["content"]) for turn in turns), "messages")
    try:
        ids = encode_turns(turns, model.tokenizer)
    except InvalidInput as error:
        raise Refused(400, f"messages: {error}", "messages", "invalid_value") from None
    room = _room(model, len(ids), "messages", body.most_tokens)
    most = body.most_tokens or min(defaults.max_tokens or room, room)
    return _asked(body, [(ids, most, "")], defaults)


def ask_completion(body: CompletionBody, model: LanguageModel, defaults: Defaults) -> Asked:
    """How texts go on. Raises Refused when the model cannot be asked that."""
    prompts = []
    for prompt in body.prompt:
        ids = _prompt_ids(model, prompt)
        room = _room(model, len(ids), "prompt", body.max_tokens)
        most = body.max_tokens or min(_DEFAULT_COMPLETION_TOKENS, room)
        text = prompt if isinstance(prompt, str) else str(model.tokenizer.decode(ids))
        prompts.append((ids, most, text if body.echo else ""))
    return _asked(body, prompts, defaults)


def _asked(
    body: WritingBody, prompts: Sequence[tuple[list[int], int, str]], defaults: Defaults
) -> Asked:
    choices = [prompt for prompt in prompts for _ in range(body.n or 1)]
    requests = [
        GenerationRequest(ids, most, body.sampling(defaults.temperature, number), body.stop)
        for number, (ids, most, _) in enumerate(choices)
    ]
    prefixes = [prefix for _, _, prefix in choices]
    return Asked(requests, prefixes, sum(len(ids) for ids, _, _ in prompts))


def _prompt_ids(model: LanguageModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        _check_length(model, len(prompt), "prompt")
        try:
            return encode_bare(prompt, model.tokenizer)
        except InvalidInput as error:
            raise Refused(400, f"prompt: {error}", "prompt", "invalid_value") from None
    size = len(model.tokenizer)
    wrong = next((token_id for token_id in prompt if not 0 <= token_id < size), None)
    if wrong is not None:
        message = f"prompt: token ids must lie between 0 and {size - 1}, got {wrong}"
        raise Refused(400, message, "prompt", "invalid_value")
    return prompt


def _check_length(model: LanguageModel, num_characters: int, param: str) -> None:
    """Before it costs memory and time: raises Refused for what cannot be few enough tokens."""
    if num_characters > model.max_length * _longest_token(model.tokenizer):
        message = (
            f"{param}: this model's maximum context length is {model.max_length} tokens, and "
            f"{num_characters} characters are more than these can have"
        )
        raise Refused(400, message, param, "context_length_exceeded")


@functools.lru_cache(maxsize=4)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(map(len, tokenizer.get_vocab()))


def _room(model: LanguageModel, num_prompt: int, param: str, asked: int | None) -> int:
    """Most tokens that fit after the prompt. Raises Refused when what is asked for does not."""
    most = model.max_length
    if num_prompt == 0:
        raise Refused(400, f"{param}: must hold one token at least", param, "invalid_value")
    if num_prompt + (asked or 1) > most:
        message = (
            f"{param}: this model's maximum context length is {most} tokens, but the request has "
            f"{num_prompt} tokens of {param} and asks for {asked or 'at least 1'} more"
        )
        raise Refused(400, message, param, "context_length_exceeded")
    return most - num_prompt
