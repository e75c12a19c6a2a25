"""The questions of a benchmark and the solved examples to show before them. Imports no torch."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lesft.errors import DataError, InvalidInput
from lesft_client.data import Sample, load_samples
from lesft_client.data.answer_values import number_value
from lesft_client.data.prompts import AnswerKind, base_prompt

BENCHMARKS = ("gsm8k", "commonsense_qa", "aqua_rat", "wordproblems")
_OF_NUMBERS = ("gsm8k", "wordproblems")
_OF_CHOICES = ("commonsense_qa", "aqua_rat")

_KINDS: tuple[AnswerKind, ...] = ("number", "letter of the right choice")
_CHOICE = re.compile(r"^([A-Z])\) ?", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """One sample, and the parts that its prompt is made of."""

    sample: Sample
    text: str
    """The question alone: no instruction, no choices."""
    choices: dict[str, str]
    """Each choice's text by its letter; empty where there are none."""


@dataclass(frozen=True)
class Benchmark:
    """What is asked. With `has_choices`, every question and example is one of choices."""

    name: str
    questions: Sequence[Question]
    shots: Sequence[Question]
    has_choices: bool
    digest: str
    """`sha256:` and hex digits over questions, examples, solutions and answers, in order."""


def load_benchmark(
    name: str, data: str, count: int, num_shots: int, seed: int, needs_answers: bool = True
) -> Benchmark:
    """At most `count` test questions (0: all) and `num_shots` training examples, by the seed.

    `name` is one of BENCHMARKS or a JSONL file; `data` is where its rows lie, or empty for the
    hub. Of a file, a tenth is the test split, as in training with the same seed. With
    `needs_answers`, every question must have a final answer to compare with. Raises DataError when
    the data cannot be read, is not this benchmark's or has too few examples; InvalidInput for all
    of the generated problems.
    """
    source = data or name
    questions = [split_prompt(sample) for sample in _test_samples(name, source, count, seed)]
    train = load_samples(source, "train", num_shots, seed) if num_shots else []
    shots = [split_prompt(sample) for sample in train]
    has_choices = all(_is_a_choice(question) for question in questions)
    _check(name, source, questions, has_choices, needs_answers)
    if has_choices and not all(_is_a_choice(shot) for shot in shots):
        raise DataError(
            f"{source}: the examples must be questions with choices as its test questions are; "
            "use --shots 0"
        )
    return Benchmark(name, questions, shots, has_choices, _digest(questions, shots))


def split_prompt(sample: Sample) -> Question:
    """The question and the choices in a prompt that `base_prompt` and `with_choices` worded.

    Any other prompt is a question as it stands.
    """
    text = sample.prompt
    for kind in _KINDS:
        text = text.removeprefix(base_prompt("", kind))
    marks = list(_CHOICE.finditer(text))
    first = max((i for i, mark in enumerate(marks) if mark[1] == "A"), default=len(marks))
    marks = marks[first:]
    in_order = "".join(mark[1] for mark in marks) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(marks)]
    if len(marks) < 2 or not in_order:
        return Question(sample, text, {})
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    choices = {
        mark[1]: text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)
    }
    return Question(sample, text[: marks[0].start()].rstrip(), choices)


def _test_samples(name: str, source: str, count: int, seed: int) -> list[Sample]:
    if source == "wordproblems":
        if count == 0:
            raise InvalidInput(
                "wordproblems makes as many questions as asked for, so --questions 0 (all of them) "
                "has no meaning: give a number"
            )
        return load_samples(source, "test", count, seed)
    samples = load_samples(source, "test", None, seed)
    return load_samples(source, "test", count, seed) if 0 < count < len(samples) else samples


def _is_a_choice(question: Question) -> bool:
    return question.sample.answer in question.choices


def _check(
    name: str, source: str, questions: Sequence[Question], has_choices: bool, needs_answers: bool
) -> None:
    for number, question in enumerate(questions, start=1):
        answer = question.sample.answer
        if not answer and needs_answers:
            raise DataError(
                f"{source}: test question {number} has no answer to compare with; give each line "
                'an "answer", or a target that ends in `#### <answer>`, or use --measure likelihood'
            )
        if name in _OF_NUMBERS and number_value(answer) is None:
            raise DataError(
                f"{source} is not {name}: the answer of test question {number} is no number; name "
                "the benchmark that the data belongs to"
            )
    if name in _OF_CHOICES and not has_choices:
        raise DataError(
            f"{source} is not {name}: its questions have no lettered choices; name the benchmark "
            "that the data belongs to"
        )


def _digest(questions: Sequence[Question], shots: Sequence[Question]) -> str:
    asked, shown = (
        [(each.sample.prompt, each.sample.target, each.sample.answer) for each in part]
        for part in (questions, shots)
    )
    return f"sha256:{hashlib.sha256(json.dumps([asked, shown]).encode()).hexdigest()}"
