from typing import Any

import pytest

from lesft.errors import DataError
from lesft_client.data import aqua_rat
from lesft_client.data.aqua_rat import without_answer
from lesft_client.data.rows import Row


def row(**changes: Any) -> Row:
    fields = {
        "question": "A pump fills 4 tanks in 2 hours. How many tanks does it fill in an hour?",
        "options": ["A)1 tank", "B)2 tanks", "C) 8 tanks"],
        "rationale": "4 tanks in 2 hours\n= 4/2 = 2 tanks an hour\nAnswer : B",
        "correct": "B",
    }
    return Row("train_dev.jsonl:3", {**fields, **changes})


def test_the_target_is_the_rationale_and_then_the_letter_once() -> None:
    [sample] = aqua_rat.samples([row()])
    assert sample.target == "4 tanks in 2 hours\n= 4/2 = 2 tanks an hour\n#### B"
    assert sample.answer == "B"


def test_both_prompts_list_the_options_and_the_reference_shows_the_right_one() -> None:
    [sample] = aqua_rat.samples([row()])
    options = "A) 1 tank\nB) 2 tanks\nC) 8 tanks"
    assert sample.prompt.endswith(f"fill in an hour?\n{options}")
    assert sample.reference.endswith(f"{options}\n\n### Standard answer:\nB) 2 tanks")
    assert "4/2" not in sample.reference


@pytest.mark.parametrize(
    "line",
    [
        "Answer : A",
        "Correct answer - A",
        "ANSWER:A",
        "Answer: Option A",
        "CORRECT OPTION:OPTION A",
        "Therefore, the correct answer is (A).",
        "E is the answer.",
        "Answer A is correct option",
        "Answer: D) 109 rolls",
        "Hence answer will be A. 5π",
        "ANSWER D 8000",
        "Ans - C",
        "Choice A.",
        "E)",
        "Thus A",
    ],
)
def test_a_last_line_that_only_names_the_answer_goes(line: str) -> None:
    assert without_answer(f"2 + 2 = 4\nso it is 4\n{line}\n") == "2 + 2 = 4\nso it is 4"


@pytest.mark.parametrize(
    ("line", "rest"),
    [
        ("So x = 250 m. Answer D", "So x = 250 m."),
        ("That is 4 + 6 = 10 ANS:D", "That is 4 + 6 = 10"),
        ("It is 5% Answer :A", "It is 5%"),
        ("9,800/0.55 is 17818 ==> the correct answer is D.", "9,800/0.55 is 17818"),
        ("Each child gets 7 sheep. So option A is correct.", "Each child gets 7 sheep."),
    ],
)
def test_an_answer_named_behind_the_last_sentence_goes(line: str, rest: str) -> None:
    assert without_answer(f"First step\n{line}") == f"First step\n{rest}"


@pytest.mark.parametrize(
    "rationale",
    [
        "Total time = 17 minutes",
        "This gives us B",
        "2D = 16\nD = 8",
        "|x^3| > |y^2|, and (B) must be true.",
        "Find the right answer to this.",
        "The answer is 12 apples",
        "",
    ],
)
def test_a_reasoning_line_stays(rationale: str) -> None:
    assert without_answer(rationale) == rationale


@pytest.mark.parametrize("rationale", ["", "B", None])
def test_without_a_rationale_the_target_is_made_of_the_answer(rationale: str | None) -> None:
    [sample] = aqua_rat.samples([row(rationale=rationale)])
    assert sample.target == "The answer is 2 tanks.\n#### B"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": "D"}, "right answer 'D' must be one of distinct choices, got A, B, C"),
        ({"options": ["A)1", "A)2", "B)3"]}, "distinct choices, got A, A, B"),
        ({"options": ["1 tank", "2 tanks"]}, '"options" must be a list of "A'),
        ({"options": 5}, '"options" must be a list of "A'),
        ({"options": []}, "got none"),
        ({"question": 5}, '"question" must be a string, got int'),
    ],
)
def test_a_bad_row_is_refused_by_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^train_dev.jsonl:3: .*{message}"):
        aqua_rat.samples([row(**changes)])
