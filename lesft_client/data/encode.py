"""Samples as token ids, ready for the two paths.

A path's sequence is the prompt's ids followed by the target's. The two parts are tokenized apart,
so that the target's tokens are the same on both paths, whatever comes before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lesft.errors import DataError
from lesft_client.data.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Put before a chat template that writes today's date: a run replayed tomorrow is the same run."""

_ASSISTANT_TEXT = "assistant-text"


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of the two prompts and of the target, which ends in the end token."""

    base_ids: list[int]
    reference_ids: list[int]
    target_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Length of the longer path with the target."""
        return max(len(self.base_ids), len(self.reference_ids)) + len(self.target_ids)


def encode_samples(
    samples: Sequence[Sample], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[list[EncodedSample], int]:
    """The samples that fit, and how many do not.

    A sample is skipped when its longer path and target together exceed `max_length` tokens, also
    in runs that use one path only: all methods train on the same samples. Raises DataError when
    none fits.
    """
    end_id = end_token_id(tokenizer)
    encoded = [_encode(sample, tokenizer, end_id) for sample in samples]
    fitting = [sample for sample in encoded if sample.num_tokens <= max_length]
    if encoded and not fitting:
        lengths = [sample.num_tokens for sample in encoded]
        raise DataError(
            f"none of the {len(encoded)} samples fits into --max-length {max_length} tokens: the "
            f"shortest has {min(lengths)}, the longest {max(lengths)}; set --max-length "
            f"{max(lengths)} to use them all"
        )
    return fitting, len(encoded) - len(fitting)


def _encode(sample: Sample, tokenizer: "PreTrainedTokenizerBase", end_id: int) -> EncodedSample:
    target_ids = tokenizer.encode(sample.target, add_special_tokens=False)
    return EncodedSample(
        base_ids=encode_prompt(sample.prompt, tokenizer),
        reference_ids=encode_prompt(sample.reference, tokenizer),
        target_ids=[*target_ids, end_id],
    )


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a user's message up to where the model begins to write.

    With a chat template: the template's words for a user's turn and the start of the assistant's;
    a beginning-of-sequence token where the template writes one. Without: the prompt, a blank line,
    and the special tokens that the tokenizer puts in front.
    """
    if tokenizer.chat_template is None:
        return encode_text(f"{prompt}\n\n", tokenizer)
    text = render_turns(
        tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a text that the model is to go on with, behind the tokenizer's opening ones."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=True)
    # Some tokenizers are set to close every text, but this one goes on.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def end_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that ends the model's text.

    With a chat template, the special token that it ends an assistant's turn with, such as
    `<|im_end|>`; that is not the tokenizer's end-of-sequence in every family (gemma, phi3).
    Otherwise, and where a template writes none, the tokenizer's end-of-sequence token.
    """
    if tokenizer.chat_template is not None:
        turns = [
            {"role": "user", "content": "user-text"},
            {"role": "assistant", "content": _ASSISTANT_TEXT},
        ]
        _, _, tail = render_turns(tokenizer, turns, add_generation_prompt=False).rpartition(
            _ASSISTANT_TEXT
        )
        for token_id in tokenizer.encode(tail, add_special_tokens=False):
            added = tokenizer.added_tokens_decoder.get(token_id)
            if added is not None and added.special:
                return int(token_id)
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so a model could not learn to stop; set "
            "eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def render_turns(
    tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]], add_generation_prompt: bool
) -> str:
    """A conversation as the tokenizer's chat template words it."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    text = tokenizer.apply_chat_template(
        turns,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    return str(text)
