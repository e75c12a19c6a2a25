"""How a question is put to the model, and its solution, as token ids. Imports no torch.

`chat` is the wording of the training, in the tokenizer's chat template, with the examples as
earlier turns. `harness` is that of lm-evaluation-harness (tasks gsm8k and commonsense_qa of 0.4):
plain text, examples and blank lines between them, `Answer:` where the model goes on.

A solution that is to be scored always has the wording of the training.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lesft_client.conversation import Turn, encode_turns
from lesft_client.data.answers import MARK
from lesft_client.data.encode import encode_samples, encode_text
from lesft_client.data.prompts import base_prompt
from lesft_client.data.samples import Sample
from lesft_client.evaluation.benchmark import Question, split_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["chat", "harness"]

HARNESS_STOP = ("Question:", "</s>", "<|im_end|>")
"""The `until` of the harness's gsm8k."""


@dataclass(frozen=True)
class Prompt:
    """What the model is given."""

    ids: list[int]
    continuations: dict[str, list[int]] = field(default_factory=dict)
    """Token ids of each choice's answer by its letter, where they are to be compared."""
    stop: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """16 hex digits over the ids, the continuations and the stop strings."""
        return _digest([self.ids, *self.continuations.values(), self.stop])

    @property
    def longest_continuation(self) -> int:
        """Tokens of the longest continuation; 0 where there is none."""
        return max(map(len, self.continuations.values()), default=0)


@dataclass(frozen=True)
class Solution:
    """The data's own worked solution of a question, to be scored."""

    prompt_ids: list[int]
    """Of question and examples."""
    target_ids: list[int]
    """The same as in training, the end token with them."""

    @property
    def digest(self) -> str:
        """16 hex digits over the ids."""
        return _digest([self.prompt_ids, self.target_ids])


def make_prompt(
    question: Question,
    shots: Sequence[Question],
    style: Style,
    scored: bool,
    tokenizer: "PreTrainedTokenizerBase",
) -> Prompt:
    """The prompt of a question after the examples.

    With `scored`, the choices' letters are compared in place of a text: the examples then answer
    with nothing but their letter.
    """
    if style == "chat":
        return _chat(question, shots, scored, tokenizer)
    return _harness(question, shots, scored, tokenizer)


def make_solutions(
    questions: Sequence[Question], shots: Sequence[Question], tokenizer: "PreTrainedTokenizerBase"
) -> list[Solution]:
    """Every question's own solution after the examples, in the wording of the training.

    Without examples the ids are those that `lesft-client train` trains on and scores.
    """
    samples = [question.sample for question in questions]
    encoded, _ = encode_samples(samples, tokenizer, max_length=sys.maxsize)
    return [
        Solution(_chat(question, shots, False, tokenizer).ids, sample.target_ids)
        for question, sample in zip(questions, encoded, strict=True)
    ]


def prompt_fingerprint(
    shots: Sequence[Question], style: Style, scored: bool, tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """`sha256:` and 16 hex digits: the same where wording, template and examples are the same."""
    probe = Sample(base_prompt("?\nA) 1\nB) 2", "number"), target="", reference="", answer="A")
    return f"sha256:{make_prompt(split_prompt(probe), shots, style, scored, tokenizer).digest}"


def _chat(
    question: Question,
    shots: Sequence[Question],
    scored: bool,
    tokenizer: "PreTrainedTokenizerBase",
) -> Prompt:
    turns: list[Turn] = []
    for shot in shots:
        answer = f"{MARK} {shot.sample.answer}" if scored else shot.sample.target
        turns.append({"role": "user", "content": shot.sample.prompt})
        turns.append({"role": "assistant", "content": answer})
    turns.append({"role": "user", "content": question.sample.prompt})
    continuations = {
        letter: tokenizer.encode(f"{MARK} {letter}", add_special_tokens=False)
        for letter in (question.choices if scored else ())
    }
    # Without a template nothing but the end token says that an answer is over.
    next_prompt = base_prompt("", "number").partition(".")[0]
    stop = () if tokenizer.chat_template is not None else (next_prompt,)
    return Prompt(encode_turns(turns, tokenizer), continuations, stop)


def _harness(
    question: Question,
    shots: Sequence[Question],
    scored: bool,
    tokenizer: "PreTrainedTokenizerBase",
) -> Prompt:
    examples = [
        f"{_asked(shot)} {shot.sample.answer if scored else shot.sample.target}" for shot in shots
    ]
    text = "\n\n".join([*examples, _asked(question)])
    ids = encode_text(text, tokenizer)
    continuations = {
        letter: encode_text(f"{text} {letter}", tokenizer)[len(ids) :]
        for letter in (question.choices if scored else ())
    }
    return Prompt(ids, continuations, HARNESS_STOP)


def _asked(question: Question) -> str:
    choices = [f"{letter}. {text}" for letter, text in question.choices.items()]
    return "\n".join([f"Question: {question.text}", *choices, "Answer:"])


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
