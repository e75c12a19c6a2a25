"""What became of the test questions: questions.json, and the figures over all of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lesft.wilson import wilson_interval

QUESTIONS_FILE = "questions.json"


class Question(BaseModel):
    """One test question, put to one model."""

    index: int
    """Its place among the test questions that were drawn, from 0."""
    right: bool | None
    """None where no answer was asked for."""
    nll: float | None
    """Sum of -log P over the tokens of its own solution, in nats; None where not measured."""
    nll_tokens: int
    prompt: str = ""
    """Digest of the token ids that were put to the model: two with the same are one question. Empty
    in files of before there was one."""


@dataclass(frozen=True)
class Questions:
    """Questions as they came out before and after training; None for what was not asked."""

    before: list[Question] | None = None
    after: list[Question] | None = None
    digest: str | None = None
    """Over the questions after, their solutions and answers, as `lesft-client evaluate` has it."""


def questions_of(evaluations: Sequence[Mapping[str, Any]]) -> list[Question]:
    """The questions of one or several evaluation.json, in order."""
    every = [each for evaluation in evaluations for each in evaluation["predictions"]]
    return sorted(map(_question, every), key=lambda question: question.index)


def _question(prediction: Mapping[str, Any]) -> Question:
    return Question(**{name: prediction[name] for name in Question.model_fields})


def accuracy(questions: Sequence[Question]) -> tuple[float, tuple[float, float]] | None:
    """Share of right answers with Wilson's 95% interval; None where none was asked for."""
    answers = [question.right for question in questions if question.right is not None]
    if not answers:
        return None
    return sum(answers) / len(answers), wilson_interval(sum(answers), len(answers))


def nll_per_token(questions: Sequence[Question]) -> float | None:
    """Mean -log P over the tokens of all solutions, in nats; None where it was not measured."""
    measured = [question for question in questions if question.nll is not None]
    tokens = sum(question.nll_tokens for question in measured)
    return sum(question.nll or 0.0 for question in measured) / tokens if tokens else None


def write_questions(questions: Questions, output: Path) -> None:
    """Write questions.json."""
    body = {
        when: None if asked is None else [each.model_dump() for each in asked]
        for when, asked in (("before", questions.before), ("after", questions.after))
    }
    (output / QUESTIONS_FILE).write_text(json.dumps(body, indent=1) + "\n")
