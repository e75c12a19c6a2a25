"""The turns of a conversation as token ids, up to where the model begins to write."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lesft.errors import InvalidInput
from lesft_client.data.encode import encode_prompt, encode_text, render_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]
"""A message: its "role" (system, user or assistant) and its "content"."""


def encode_turns(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of the turns and of the beginning of the assistant's next one.

    As the samples of the training are encoded: in the words of the tokenizer's chat template, or,
    where it has none, as one text with blank lines between the turns. Raises InvalidInput for
    turns that the template refuses, and for text that is not Unicode.
    """
    for turn in turns:
        _check_unicode(turn["content"])
    if tokenizer.chat_template is None:
        return encode_prompt("\n\n".join(turn["content"] for turn in turns), tokenizer)
    try:
        text = render_turns(tokenizer, list(turns), add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise InvalidInput(
            f"the model's chat template does not take messages of the roles {roles}: {error}"
        ) from None
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_bare(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a text that the model goes on with as it is. Raises InvalidInput."""
    _check_unicode(text)
    return encode_text(text, tokenizer)


def _check_unicode(text: str) -> None:
    """JSON and the command line can hold halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"the text must be Unicode, but its character {error.start + 1} is half of one: "
            f"U+{ord(text[error.start]):04X}"
        ) from None


def fit_turns(
    turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", max_tokens: int
) -> tuple[list[Turn], list[int]]:
    """The latest turns that fit into `max_tokens`, and their token ids.

    The oldest questions go first, each with its answer; a system turn at the beginning stays.
    Raises InvalidInput when the last question alone does not fit.
    """
    num_system = 1 if turns and turns[0]["role"] == "system" else 0
    kept = list(turns)
    while len(ids := encode_turns(kept, tokenizer)) > max_tokens:
        if len(kept) <= num_system + 1:
            raise InvalidInput(
                f"the message has {len(ids)} tokens with what belongs to it, but the model takes "
                f"{max_tokens} at most; say it in fewer words"
            )
        del kept[num_system : num_system + 2]
    return kept, ids
