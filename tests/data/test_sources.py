import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lesft.errors import DataError
from lesft_client.data import client_share, load_samples

GSM8K = {"question": "Half of 8?", "answer": "8/2 = <<8/2=4>>4\n#### 4"}
AQUA = {"question": "Half of 8?", "options": ["A)4"], "rationale": "8/2 = 4", "correct": "A"}
COMMONSENSE = {
    "id": "x1",
    "answerKey": "A",
    "question": {"stem": "Where is a boat?", "choices": [{"label": "A", "text": "lake"}]},
}
EXPLANATION = {"id": "x1", "explanation": {"open-ended": "boats float"}}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def own(number: int) -> dict[str, str]:
    return {"prompt": f"prompt {number}", "target": f"target {number}", "answer": str(number)}


def test_a_gsm8k_folder_has_a_train_and_a_test_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GSM8K, GSM8K)
    write(tmp_path / "test.jsonl", {**GSM8K, "question": "Half of 8, please?"})
    assert [s.target for s in load_samples(str(tmp_path), "train", None, 0)] == [
        "8/2 = 4\n#### 4"
    ] * 2
    assert "Half of 8, please?" in load_samples(str(tmp_path), "test", None, 0)[0].prompt


def test_a_commonsense_qa_folder_is_explained_for_training_only(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", COMMONSENSE)
    write(tmp_path / "validation.jsonl", COMMONSENSE)
    write(tmp_path / "cose_train.jsonl", EXPLANATION)
    [train] = load_samples(str(tmp_path), "train", None, 0)
    [test] = load_samples(str(tmp_path), "test", None, 0)
    assert train.target == "boats float\n#### A"
    assert test.target == "The answer is lake.\n#### A"


def test_a_commonsense_qa_folder_needs_no_explanations(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", COMMONSENSE)
    [sample] = load_samples(str(tmp_path), "train", None, 0)
    assert sample.target == "The answer is lake.\n#### A"


def test_an_aqua_rat_folder_is_known_by_its_fields_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "train_dev.jsonl", AQUA)
    write(tmp_path / "gsm8k" / "test.jsonl", AQUA)
    for split in ("train", "test"):
        [sample] = load_samples(str(tmp_path / "gsm8k"), split, None, 0)
        assert sample.target == "8/2 = 4\n#### A"


def test_a_folder_without_the_file_of_a_split_is_refused_by_that_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GSM8K)
    with pytest.raises(DataError, match=r"test\.jsonl: cannot be read: No such file"):
        load_samples(str(tmp_path), "test", None, 0)


def test_the_parent_of_data_folders_is_refused_with_the_folder_that_was_meant(
    tmp_path: Path,
) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", GSM8K)
    meant = re.escape(f"did you mean {tmp_path / 'gsm8k'}?")
    with pytest.raises(DataError, match=f"holds no data set that is known.*{meant}"):
        load_samples(str(tmp_path), "train", None, 0)


def test_a_folder_of_ones_own_rows_is_refused_and_the_file_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", own(1))
    with pytest.raises(
        DataError, match=r"gsm8k: train\.jsonl and test\.jsonl with .*JSONL file itse"
    ):
        load_samples(str(tmp_path), "train", None, 0)


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(
        DataError,
        match=r"'gms8k' is neither a data set \(gsm8k, commonsense_qa, .*, wordproblems\) nor",
    ):
        load_samples("gms8k", "train", None, 0)


def test_an_empty_file_and_a_file_of_blank_lines_are_refused(tmp_path: Path) -> None:
    for text in ("", "\n \n"):
        path = tmp_path / "mine.jsonl"
        path.write_text(text)
        with pytest.raises(DataError, match=r"mine.jsonl \(train\) has no samples"):
            load_samples(str(path), "train", None, 0)


def test_a_bad_line_of_a_file_is_refused_with_file_and_line(tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", own(1), {**own(2), "target": ""})
    with pytest.raises(DataError, match=r'mine\.jsonl:2: "target" must not be empty'):
        load_samples(data, "train", None, 0)


def test_a_tenth_of_a_file_is_held_out_and_the_rest_is_for_training(tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", *map(own, range(43)))
    train = load_samples(data, "train", None, 7)
    test = load_samples(data, "test", None, 7)
    assert len(test) == 4
    assert {s.prompt for s in train} | {s.prompt for s in test} == {
        f"prompt {i}" for i in range(43)
    }
    assert len(train) == 39
    assert test != load_samples(data, "test", None, 8)


def test_prompts_that_come_and_go_move_few_others_to_the_other_side(tmp_path: Path) -> None:
    def held_out(*numbers: int) -> set[str]:
        data = write(tmp_path / "mine.jsonl", *map(own, numbers))
        return {sample.prompt for sample in load_samples(data, "test", None, 0)}

    before = held_out(*range(200))
    assert len(before) == 20
    for changed in (range(1, 200), range(220), [*range(100), *range(101, 200)]):
        assert len(held_out(*changed) & {f"prompt {i}" for i in range(200)} - before) <= 2


def test_a_prompt_on_several_lines_is_on_one_side_only(tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", *(own(i % 5) for i in range(50)))
    for seed in range(5):
        train = {s.prompt for s in load_samples(data, "train", None, seed)}
        test = {s.prompt for s in load_samples(data, "test", None, seed)}
        assert len(train) == 4
        assert len(test) == 1
        assert not train & test


def test_a_file_of_one_prompt_trains_but_holds_nothing_out(tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", own(1))
    assert [s.answer for s in load_samples(data, "train", None, 0)] == ["1"]
    with pytest.raises(DataError, match="has one prompt only, which is for training"):
        load_samples(data, "test", None, 0)


def test_a_count_draws_different_samples_with_the_seed(tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", *map(own, range(40)))
    drawn = load_samples(data, "train", 12, 3)
    assert len({s.prompt for s in drawn}) == 12
    assert drawn == load_samples(data, "train", 12, 3)
    assert drawn != load_samples(data, "train", 12, 4)
    with pytest.raises(DataError, match=r"\(train\) has 36 samples, 37 were asked for"):
        load_samples(data, "train", 37, 3)


def test_clients_that_load_the_same_problems_share_them_without_overlap() -> None:
    shares = [
        client_share(load_samples("wordproblems", "train", 40, 1), i, 4, 10, 1) for i in range(4)
    ]
    assert len({sample.prompt for share in shares for sample in share}) == 40


def test_wordproblems_need_a_count() -> None:
    with pytest.raises(
        DataError, match="as many samples as asked for: say how many with --samples"
    ):
        load_samples("wordproblems", "train", None, 0)


def test_importing_the_data_side_loads_no_heavy_library() -> None:
    code = (
        "import sys, lesft_client.data; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
