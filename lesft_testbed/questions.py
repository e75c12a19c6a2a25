"""What became of the test questions: questions.json, and the figures over all of them."""

import json
from collections.abc import Mapping, Sequence
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


Questions = dict[str, list[Question]]
"""Questions as they came out "before" and "after"; what was not asked is missing."""


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
        when: [each.model_dump() for each in questions[when]] if when in questions else None
        for when in ("before", "after")
    }
    (output / QUESTIONS_FILE).write_text(json.dumps(body, indent=1) + "\n")
