from typing import Any

import pytest

from lesft.errors import DataError
from lesft_client.data import commonsense_qa
from lesft_client.data.rows import Row

CHOICES = [{"label": "A", "text": "shed"}, {"label": "B", "text": "lake "}]


def question(id_: str, **changes: Any) -> Row:
    fields = {
        "id": id_,
        "answerKey": "B",
        "question": {"question_concept": "boat", "stem": "Where is a boat?", "choices": CHOICES},
    }
    return Row(f"train.jsonl:{id_}", {**fields, **changes})


def explanation(id_: str, text: Any) -> Row:
    fields = {"id": id_, "explanation": {"open-ended": text, "selected": "boat"}}
    return Row(f"cose_train.jsonl:{id_}", fields)


def test_the_target_is_the_human_explanation_of_this_question_then_the_letter() -> None:
    explanations = [explanation("2", "sheds are dry"), explanation("1", "boats need water")]
    [sample] = commonsense_qa.samples([question("1")], explanations)
    assert sample.target == "boats need water\n#### B"
    assert sample.answer == "B"


def test_both_prompts_list_the_lettered_choices_and_the_reference_shows_the_right_one() -> None:
    [sample] = commonsense_qa.samples([question("1")], [])
    assert sample.prompt == (
        "Solve the following problem step by step. "
        "End with a last line `#### <letter of the right choice>`.\n\n"
        "Where is a boat?\nA) shed\nB) lake"
    )
    assert sample.reference.endswith(
        "### Question:\nWhere is a boat?\nA) shed\nB) lake\n\n### Standard answer:\nB) lake"
    )


def test_without_an_explanation_the_target_is_made_of_the_answer() -> None:
    [sample] = commonsense_qa.samples([question("1")], [explanation("2", "sheds are dry")])
    assert sample.target == "The answer is lake.\n#### B"


def test_a_phrase_under_three_questions_explains_none_but_under_two_it_does() -> None:
    texts = ["rivers flow", "Rivers flow.", "rivers flow", "boats float", "boats float"]
    explanations = [explanation(str(i), text) for i, text in enumerate(texts)]
    questions = [question(str(i)) for i in range(5)]
    targets = [sample.target for sample in commonsense_qa.samples(questions, explanations)]
    assert targets == ["The answer is lake.\n#### B"] * 3 + ["boats float\n#### B"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answerKey": "C"}, "right answer 'C' must be one of distinct choices, got A, B"),
        ({"answerKey": ""}, '"answerKey" must not be empty'),
        ({"question": "Where is a boat?"}, '"question" must hold a "stem" and "choices"'),
        ({"question": {"stem": "?", "choices": [{"label": "A"}]}}, '"question" must hold'),
        ({"question": {"stem": "?", "choices": [*CHOICES, CHOICES[1]]}}, "distinct choices"),
    ],
)
def test_a_bad_row_is_refused_by_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^train.jsonl:1: .*{message}"):
        commonsense_qa.samples([question("1", **changes)], [])


def test_a_bad_explanation_is_refused_by_its_place() -> None:
    with pytest.raises(DataError, match=r'^cose_train\.jsonl:1: "explanation" must hold a string'):
        commonsense_qa.samples([question("1")], [explanation("1", None)])
