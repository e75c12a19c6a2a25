import pytest

from lesft.errors import DataError
from lesft_client.data import Sample, label_counts, wordproblems
from lesft_client.data.labels import Skew, num_steps, skew_labels


def made(label: str = "", answer: str = "", target: str = "One.") -> Sample:
    return Sample("prompt", target, "reference", answer, label)


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("2 + 2 = 4\n#### 4", 1),
        ("a = 1\nb = 2\n\n  \nc = 3\n#### 6", 3),
        ("a = 1\nb = 2", 2),
        ("#### 4", 0),
        ("#### Heading\nSo it is.\n#### B", 2),
    ],
)
def test_steps_are_the_written_lines_above_the_final_one(target: str, steps: int) -> None:
    assert num_steps(target) == steps


def test_each_skew_has_labels_of_its_own() -> None:
    samples = [
        made("sums", "A", "1 + 1\n#### A"),
        made("sums", "B", "So.\nThus.\n#### B"),
        made("trains", "B", "So.\n#### B"),
    ]
    assert skew_labels(samples, "label") == ["sums", "sums", "trains"]
    assert skew_labels(samples, "answer") == ["A", "B", "B"]
    assert skew_labels(samples, "steps") == ["1", "2", "1"]
    assert skew_labels(samples, "size") == ["", "", ""]


LETTERS = [made("", "A", "One.\n#### A"), made("", "B", "One.\nTwo.\n#### B")]
NUMBERS = [made("", "4", "One.\n#### 4"), made("", "5", "One.\nTwo.\n#### 5")]


@pytest.mark.parametrize(
    ("samples", "skew", "message"),
    [
        (
            LETTERS,
            "label",
            "--skew label: 2 of 2 samples have no label; they can have --skew answer or "
            "--skew steps or --skew size",
        ),
        (
            [made("sums"), made("trains"), made()],
            "label",
            "--skew label: 1 of 3 samples have no label; they can have --skew size",
        ),
        (
            [made("sums"), made("sums")],
            "label",
            "--skew label: all 2 samples have the same label; they can have --skew size",
        ),
        (
            [*LETTERS, *NUMBERS],
            "answer",
            "--skew answer: 2 of 4 samples have a final answer that is no letter of a choice; they "
            "can have --skew steps or --skew size",
        ),
        (
            [made("sums", "A"), made("trains", "A"), made("trains", "B")],
            "steps",
            "--skew steps: all 3 samples have the same number of steps; they can have "
            "--skew label or --skew answer or --skew size",
        ),
    ],
)
def test_samples_without_such_labels_are_refused_with_the_skews_that_they_have(
    samples: list[Sample], skew: Skew, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        skew_labels(samples, skew)
    assert str(caught.value) == message


def test_a_message_quotes_nothing_of_the_data() -> None:
    with pytest.raises(DataError) as caught:
        skew_labels([made("secret", "secret"), made("secret", "secret")], "label")
    assert "secret" not in str(caught.value)


def test_labels_are_counted_by_what_the_skew_is_over() -> None:
    samples = [
        made("trains", "B", "x\n" * 10),
        made("sums", "A", "x\n" * 2),
        made("trains", "A", "x\n" * 2),
    ]
    assert list(label_counts(samples, "answer").items()) == [("A", 2), ("B", 1)]
    assert list(label_counts(samples, "steps").items()) == [("2", 2), ("10", 1)]
    for skew in ("label", "none", "size"):
        assert list(label_counts(samples, skew).items()) == [("sums", 1), ("trains", 2)]


def test_samples_without_a_label_among_others_are_counted_too() -> None:
    assert label_counts([made("sums"), made(), made()], "none") == {"no label": 2, "sums": 1}


def test_nothing_is_counted_where_there_are_no_labels_or_more_than_fifty() -> None:
    assert label_counts([made(), made()], "none") == {}
    assert label_counts([], "label") == {}
    assert label_counts([made(str(n)) for n in range(51)], "label") == {}
    assert len(label_counts([made(str(n)) for n in range(50)], "label")) == 50


def test_a_word_problem_is_labelled_with_its_story() -> None:
    counts = label_counts(wordproblems.samples("train", 36, 0), "none")
    assert len(counts) == 18
    assert set(counts.values()) == {2}
    assert {"change", "school trip", "eggs"} <= counts.keys()
