"""Test questions: from evaluations to figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from lesft_testbed.questions import (
    Question,
    Questions,
    accuracy,
    nll_per_token,
    questions_of,
    write_questions,
)


def prediction(index: int, right: bool | None, nll: float | None, tokens: int) -> dict[str, Any]:
    """As evaluation.json has it, with more beside."""
    measured = {"right": right, "nll": nll, "nll_tokens": tokens}
    return {"index": index, **measured, "prompt": f"p{index}", "text": "#### 4"}


def test_clients_that_answer_a_share_each_answer_the_whole_together() -> None:
    first = {"predictions": [prediction(0, True, 6.0, 4), prediction(2, False, 1.0, 1)]}
    second = {"predictions": [prediction(1, True, 3.0, 5)]}
    questions = questions_of([first, second])
    assert [question.index for question in questions] == [0, 1, 2]
    assert [question.prompt for question in questions] == ["p0", "p1", "p2"]
    assert [question.right for question in questions] == [True, True, False]
    assert nll_per_token(questions) == pytest.approx((6 + 3 + 1) / (4 + 5 + 1))
    share, interval = accuracy(questions) or (None, None)
    assert share == pytest.approx(2 / 3)
    # Wilson's interval for 2 of 3, by hand: (2/3 + z²/6 ± z·sqrt(2/27 + z²/36)) / (1 + z²/3).
    assert interval == pytest.approx((0.2077, 0.9385), abs=1e-4)


def test_what_was_not_measured_is_none() -> None:
    assert accuracy([Question(index=0, right=None, nll=1.5, nll_tokens=3)]) is None
    assert nll_per_token([Question(index=0, right=True, nll=None, nll_tokens=0)]) is None
    assert accuracy([]) is None
    assert nll_per_token([]) is None


def test_the_file_holds_every_question_and_null_for_what_was_not_asked(tmp_path: Path) -> None:
    question = Question(index=3, right=False, nll=2.5, nll_tokens=7, prompt="p3")
    write_questions(Questions(after=[question]), tmp_path)
    assert json.loads((tmp_path / "questions.json").read_text()) == {
        "before": None,
        "after": [{"index": 3, "right": False, "nll": 2.5, "nll_tokens": 7, "prompt": "p3"}],
    }
