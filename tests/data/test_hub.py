"""The hub's rows come from a stand-in for the `datasets` library: tests use no network."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lesft.errors import DataError
from lesft_client.data import load_samples

HUB: dict[tuple[str, str | None, str], list[dict[str, Any]]] = {
    ("openai/gsm8k", "main", "train"): [{"question": "Half of 8?", "answer": "8/2=4\n#### 4"}],
    ("openai/gsm8k", "main", "test"): [{"question": "Half of 6?", "answer": "6/2=3\n#### 3"}],
    ("deepmind/aqua_rat", "raw", "train"): [
        {
            "question": "Half of 8?",
            "options": ["A)4", "B)5"],
            "rationale": "8/2 = 4\nAnswer: A",
            "correct": "A",
        }
    ],
    **{
        ("tau/commonsense_qa", None, split): [
            {
                "id": "x1",
                "question": "Where is a boat?",
                "question_concept": "boat",
                "choices": {"label": ["A", "B"], "text": ["shed", "lake"]},
                "answerKey": "B",
            }
        ]
        for split in ("train", "validation")
    },
    ("Salesforce/cos_e", "v1.11", "train"): [
        {"id": "x1", "answer": "lake", "abstractive_explanation": "boats float"}
    ],
}


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
        try:
            return HUB[path, name, split]
        except KeyError:
            raise ConnectionError("no route to the hub") from None

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_gsm8k_by_name_is_the_hubs_train_and_test() -> None:
    assert load_samples("gsm8k", "train", None, 0)[0].target == "8/2=4\n#### 4"
    assert load_samples("gsm8k", "test", None, 0)[0].target == "6/2=3\n#### 3"


def test_aqua_rat_by_name_is_cleaned_like_the_files() -> None:
    assert load_samples("aqua_rat", "train", None, 0)[0].target == "8/2 = 4\n#### A"


def test_commonsense_qa_by_name_is_read_with_its_explanations() -> None:
    [sample] = load_samples("commonsense_qa", "train", None, 0)
    assert sample.prompt.endswith("Where is a boat?\nA) shed\nB) lake")
    assert sample.target == "boats float\n#### B"


def test_commonsense_qa_is_tested_on_the_validation_split_without_explanations() -> None:
    [sample] = load_samples("commonsense_qa", "test", None, 0)
    assert sample.target == "The answer is lake.\n#### B"


def test_a_bad_row_of_the_hub_is_refused_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HUB, ("openai/gsm8k", "main", "train"), [{"question": "?", "answer": "4"}])
    with pytest.raises(DataError, match=r"^openai/gsm8k train row 0: .*#### <number>"):
        load_samples("gsm8k", "train", None, 0)


def test_a_hub_out_of_reach_is_said_with_the_way_out() -> None:
    with pytest.raises(
        DataError,
        match=r"aqua_rat cannot be loaded .*\(deepmind/aqua_rat, test\): no route to the hub; "
        r"check the network, or give a local folder .*--data \./aqua_rat",
    ):
        load_samples("aqua_rat", "test", None, 0)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"pip install 'lesft\[hub\]', or give a local folder .*--data \./gsm8k"
    ):
        load_samples("gsm8k", "train", None, 0)
