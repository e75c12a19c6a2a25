"""Which questions are asked, and the parts of their prompts."""

from pathlib import Path

import pytest

from lesft.errors import DataError, InvalidInput
from lesft_client.data import Sample
from lesft_client.data.prompts import base_prompt, with_choices
from lesft_client.evaluation.benchmark import load_benchmark, split_prompt
from tests.evaluation import datasets

CHOICES = {"A": "bank", "B": "new\nyork", "C": ""}


def sample(prompt: str, answer: str = "18") -> Sample:
    return Sample(prompt, "target", "reference", answer)


def test_a_prompt_comes_apart_into_question_and_choices() -> None:
    text = with_choices("Where is it?\nB) so they say.", CHOICES)
    question = split_prompt(sample(base_prompt(text, "letter of the right choice")))
    assert question.text == "Where is it?\nB) so they say."
    assert question.choices == CHOICES


@pytest.mark.parametrize(
    "text", ["How many?", "A) one line only", "Which?\nA) one\nC) three", "B) two\nA) one"]
)
def test_a_prompt_without_choices_in_order_is_a_question_as_it_stands(text: str) -> None:
    for prompt in (text, base_prompt(text, "number")):
        assert split_prompt(sample(prompt)).text == text
        assert split_prompt(sample(prompt)).choices == {}


def test_questions_come_from_the_test_split_and_examples_from_the_train_split(
    tmp_path: Path,
) -> None:
    found = load_benchmark("gsm8k", datasets.gsm8k(tmp_path), 5, 3, seed=1)
    assert len({question.text for question in found.questions}) == 5
    assert all("(test)" in question.text for question in found.questions)
    assert len(found.shots) == 3
    assert all("(train)" in shot.text for shot in found.shots)
    assert not found.has_choices


def test_the_seed_decides_which_questions(tmp_path: Path) -> None:
    folder = datasets.gsm8k(tmp_path)
    first, again, other = (load_benchmark("gsm8k", folder, 5, 0, seed) for seed in (1, 1, 2))
    assert first.questions == again.questions
    assert first.digest == again.digest
    assert first.digest != other.digest


def test_zero_or_more_than_there_are_asks_all_questions(tmp_path: Path) -> None:
    folder = datasets.gsm8k(tmp_path, count=12)
    for count in (0, 12, 1000):
        assert len(load_benchmark("gsm8k", folder, count, 0, 0).questions) == 12


def test_a_benchmark_of_choices_knows_them(tmp_path: Path) -> None:
    found = load_benchmark("commonsense_qa", datasets.commonsense_qa(tmp_path), 0, 1, 0)
    assert found.has_choices
    assert found.questions[1].choices["B"] == "thing b"
    assert found.questions[1].sample.answer == "B"
    assert found.questions[1].text == "Which is 1 (validation)?"


def test_a_file_of_ones_own_may_hold_choices_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"Which is {n}?\nA) one\nB) two", "target": "#### B"} for n in range(20)]
    path = datasets.write_rows(tmp_path / "own.jsonl", rows)
    found = load_benchmark(str(path), "", 0, 4, 0)
    assert found.has_choices
    assert len(found.questions) == 2
    asked, shown = ({each.text for each in part} for part in (found.questions, found.shots))
    assert len(shown) == 4
    assert not asked & shown


def test_word_problems_need_a_number() -> None:
    assert len(load_benchmark("wordproblems", "", 7, 2, 0).questions) == 7
    with pytest.raises(InvalidInput, match=r"--questions 0 .* has no meaning: give a number"):
        load_benchmark("wordproblems", "", 0, 0, 0)


def test_data_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    choices, numbers = datasets.commonsense_qa(tmp_path / "c"), datasets.gsm8k(tmp_path / "n")
    with pytest.raises(DataError, match="is not gsm8k: the answer of test question 1 is no number"):
        load_benchmark("gsm8k", choices, 0, 0, 0)
    with pytest.raises(DataError, match="is not aqua_rat: its questions have no lettered choices"):
        load_benchmark("aqua_rat", numbers, 0, 0, 0)


def test_a_question_without_an_answer_is_refused_and_not_quoted(tmp_path: Path) -> None:
    rows = [{"prompt": f"Secret {n}", "target": "t", "reference": "r"} for n in range(20)]
    path = datasets.write_rows(tmp_path / "own.jsonl", rows)
    with pytest.raises(DataError, match="test question 1 has no answer to compare with") as error:
        load_benchmark(str(path), "", 0, 0, 0)
    assert "Secret" not in str(error.value)
