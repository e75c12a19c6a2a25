"""What `lesft-client data` writes of a skewed data set."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lesft_client.data import load_samples
from lesft_client.main import main


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def run(*argv: str) -> list[dict[str, str]]:
        output = tmp_path / "output.jsonl"
        main(["data", *argv, f"--output={output}"])
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_skewed_shares_of_word_problems_hold_different_stories(written: Any) -> None:
    options = ("--data=wordproblems", "--samples=9", "--skew=label", "--skew-alpha=0.1")
    shares = [written(*options, f"--share={number}/4") for number in (1, 2, 3, 4)]
    lines = [line for share in shares for line in share]
    assert len({line["prompt"] for line in lines}) == len(lines) == 36
    assert Counter(line["label"] for line in lines).most_common()[-1][1] == 2
    owners = Counter(label for share in shares for label in {line["label"] for line in share})
    assert len(owners) == 18
    assert sum(count == 1 for count in owners.values()) >= 10  # of an equal mixture, hardly any


def test_held_out_samples_are_the_same_mixture_for_all(written: Any) -> None:
    options = ("--data=wordproblems", "--held-out=9", "--split=test", "--share=2/4")
    assert written(*options, "--skew=label", "--skew-alpha=0.1") == written(*options)


def test_samples_is_the_mean_of_sizes(written: Any) -> None:
    options = ("--data=wordproblems", "--samples=9", "--skew=size", "--data-seed=2")
    sizes = [len(written(*options, f"--share={number}/4")) for number in (1, 2, 3, 4)]
    assert sum(sizes) == 36
    assert len(set(sizes)) > 1


def test_without_samples_the_shares_hold_all_there_is(written: Any, tmp_path: Path) -> None:
    source = tmp_path / "mine.jsonl"
    kinds = ("sums", "trains", "ages")
    lines = [
        {"prompt": f"{n}?", "target": f"It is {n}.", "answer": str(n), "label": kinds[n % 3]}
        for n in range(50)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = (f"--data={source}", "--skew=label", "--data-seed=4")
    shares = [written(*options, f"--share={number}/3") for number in (1, 2, 3)]
    train = {sample.prompt for sample in load_samples(str(source), "train", None, 4)}
    assert len(train) == 45
    assert sorted(line["prompt"] for share in shares for line in share) == sorted(train)
    assert all(line["label"] == kinds[int(line["answer"]) % 3] for s in shares for line in s)


def test_a_skew_that_the_data_does_not_have_ends_the_command(
    written: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        written("--data=wordproblems", "--samples=9", "--skew=answer")
    assert capsys.readouterr().err == (
        "lesft-client: --skew answer: 9 of 9 samples have a final answer that is no letter of a "
        "choice; they can have --skew label or --skew size\n"
    )


@pytest.mark.parametrize("alpha", ["0", "-1", "inf", "nan"])
def test_an_alpha_that_is_none_is_refused(
    written: Any, capsys: pytest.CaptureFixture[str], alpha: str
) -> None:
    with pytest.raises(SystemExit):
        written("--data=wordproblems", f"--skew-alpha={alpha}")
    err = capsys.readouterr().err
    assert err.startswith("lesft-client data: --skew-alpha: Input should be ")
    assert f", got {alpha!r}\n" in err
