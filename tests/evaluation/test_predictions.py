"""The file of predictions: what is kept, what is dropped, what is refused."""

import json
from pathlib import Path

import pytest

from lesft.errors import DataError, InvalidInput
from lesft_client.evaluation.predictions import (
    PREDICTIONS_FILE,
    Prediction,
    fingerprint_of,
    open_predictions,
)

CONDITIONS = {"model": "sha256:1", "shots": 0, "sampling": {"temperature": 0.0}}


def prediction(index: int, text: str = "#### 4") -> Prediction:
    return Prediction(
        index=index,
        prompt=f"digest {index}",
        expected="4",
        extracted="4",
        right=True,
        readings={"strict": "4"},
        text=text,
        finish_reason="stop",
        log_probs=None,
        prompt_tokens=10,
        tokens=3,
    )


def write(folder: Path, *predictions: Prediction) -> Path:
    with open_predictions(folder, CONDITIONS, fresh=False) as kept:
        for each in predictions:
            kept.add(each)
    return folder / PREDICTIONS_FILE


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    write(tmp_path / "new", prediction(1, "a\u2028b\r\u0085c\n"), prediction(0))
    with open_predictions(tmp_path / "new", CONDITIONS, fresh=False) as kept:
        assert sorted(kept.by_index) == [0, 1]
        assert kept.by_index[1].text == "a\u2028b\r\u0085c\n"
        kept.add(prediction(2))
    with open_predictions(tmp_path / "new", CONDITIONS, fresh=False) as kept:
        assert sorted(kept.by_index) == [0, 1, 2]


def test_a_prediction_is_in_the_file_as_soon_as_it_is_added(tmp_path: Path) -> None:
    with open_predictions(tmp_path, CONDITIONS, fresh=False) as kept:
        kept.add(prediction(0))
        header, line = (tmp_path / PREDICTIONS_FILE).read_text().splitlines()
    assert json.loads(header) == {
        "fingerprint": fingerprint_of(CONDITIONS),
        "conditions": CONDITIONS,
    }
    assert json.loads(line)["index"] == 0
    assert json.loads(line)["seconds"] >= 0


@pytest.mark.parametrize("lost", [1, 10, 100])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path, lost: int) -> None:
    path = write(tmp_path, prediction(0), prediction(1))
    path.write_bytes(path.read_bytes()[:-lost])
    with open_predictions(tmp_path, CONDITIONS, fresh=False) as kept:
        assert list(kept.by_index) == [0]
        kept.add(prediction(1))
    with open_predictions(tmp_path, CONDITIONS, fresh=False) as kept:
        assert list(kept.by_index) == [0, 1]


def test_a_torn_first_line_begins_anew(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    write(tmp_path, prediction(0))
    assert path.read_text().count("fingerprint") == 1


def test_other_conditions_are_refused_by_name_with_both_values(tmp_path: Path) -> None:
    path = write(tmp_path, prediction(0))
    before = path.read_bytes()
    other = {**CONDITIONS, "shots": 5}
    with pytest.raises(InvalidInput) as error, open_predictions(tmp_path, other, fresh=False):
        pass
    assert str(error.value) == (
        f"{path} was begun with shots 0 (fingerprint {fingerprint_of(CONDITIONS)}), this is "
        f"shots 5 ({fingerprint_of(other)}): use another --output, or --fresh to drop what is there"
    )
    assert path.read_bytes() == before


def test_fresh_drops_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, prediction(0))
    other = {**CONDITIONS, "shots": 5}
    with open_predictions(tmp_path, other, fresh=True) as kept:
        assert kept.by_index == {}
        kept.add(prediction(3))
    with open_predictions(tmp_path, other, fresh=False) as kept:
        assert list(kept.by_index) == [3]


def test_other_conditions_lose_nothing_where_nothing_is_answered(tmp_path: Path) -> None:
    write(tmp_path)
    with open_predictions(tmp_path, {"shots": 5}, fresh=False) as kept:
        assert kept.by_index == {}
    assert "5" in (tmp_path / PREDICTIONS_FILE).read_text()


@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_line_is_named(tmp_path: Path, number: int) -> None:
    path = write(tmp_path, prediction(0), prediction(1))
    lines = path.read_text().splitlines()
    lines[number - 1] = '{"other": 1}'
    path.write_text("\n".join([*lines, ""]))
    with (
        pytest.raises(DataError, match=rf"predictions.jsonl:{number}: is not what this command"),
        open_predictions(tmp_path, CONDITIONS, fresh=False),
    ):
        pass


def test_two_evaluations_cannot_write_one_file(tmp_path: Path) -> None:
    with open_predictions(tmp_path, CONDITIONS, fresh=False) as kept:
        kept.add(prediction(0))
        other = open_predictions(tmp_path, CONDITIONS, fresh=True)
        with pytest.raises(InvalidInput, match="is in use by another lesft-client evaluate"):
            other.__enter__()
    with open_predictions(tmp_path, CONDITIONS, fresh=False) as kept:
        assert list(kept.by_index) == [0]


def test_an_answer_to_another_prompt_is_refused(tmp_path: Path) -> None:
    write(tmp_path, prediction(0))
    with open_predictions(tmp_path, CONDITIONS, fresh=False) as kept:
        kept.check(0, "digest 0")
        kept.check(1, "any")
        with pytest.raises(DataError, match="question 0 was asked with prompt digest 0, now it is"):
            kept.check(0, "digest 1")
