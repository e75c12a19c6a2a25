from pathlib import Path

from lesft_client.data import Sample, jsonl, load_samples
from lesft_client.data.prompts import reference_prompt
from lesft_client.data.rows import Row
from lesft_client.distillation.training_set import data_set_of, taught

TARGET = "Nine times two.\n#### 18"


def from_line(**fields: str) -> Sample:
    return jsonl.samples([Row("mine.jsonl:1", fields)])[0]


def test_the_reference_shows_the_data_sets_own_solution() -> None:
    own = "9 * 2 = 18\n#### 18"
    sample = Sample("Solve: eggs?", own, reference_prompt("eggs?", "18"), "18")
    assert taught(sample, TARGET) == Sample(
        "Solve: eggs?", TARGET, reference_prompt("eggs?", own), "18"
    )


def test_a_choice_is_an_answer_alone_too() -> None:
    own = "They bud in spring.\n#### A"
    sample = Sample("Which?", own, reference_prompt("Which?\nA) buds 2", "A) buds 2"), "A")
    assert taught(sample, TARGET).reference == reference_prompt("Which?\nA) buds 2", own)


def test_without_a_solution_the_reference_goes_on_showing_the_answer() -> None:
    for target in ("18", "#### 18", "$18"):
        sample = from_line(prompt="eggs?", target=target, answer="18")
        assert taught(sample, TARGET).reference == reference_prompt("eggs?", "18")


def test_the_sentence_that_stands_for_a_missing_explanation_is_no_solution() -> None:
    reference = reference_prompt("Which?\nA) buds 2.5", "A) buds 2.5")
    alone = Sample("Which?", "The answer is buds 2.5.\n#### A", reference, "A")
    assert taught(alone, TARGET).reference == reference
    own = "The answer is buds, as it is a tree.\n#### A"
    explained = Sample("Which?", own, reference, "A")
    assert taught(explained, TARGET).reference == reference_prompt("Which?\nA) buds 2.5", own)


def test_a_line_without_reference_shows_its_own_target() -> None:
    sample = from_line(prompt="eggs?", target="9 * 2 = 18", answer="18")
    assert taught(sample, TARGET).reference == reference_prompt("eggs?", "9 * 2 = 18")


def test_a_reference_of_ones_own_is_kept() -> None:
    own = "My notes say 18.\n\n### Standard answer:\n18"
    sample = from_line(prompt="eggs?", target="9 * 2 = 18\n#### 18", reference=own)
    assert taught(sample, TARGET).reference == own


def test_word_problems_keep_the_other_worked_solution() -> None:
    for sample in load_samples("wordproblems", "train", 30, 1):
        assert taught(sample, TARGET).reference == sample.reference


def test_a_folder_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "eggs?", "answer": "so\\n#### 18"}\n')
    assert data_set_of(str(tmp_path)) == "gsm8k"
    assert data_set_of("aqua_rat") == "aqua_rat"
    assert data_set_of(str(tmp_path / "mine.jsonl")) == ""
