"""The figures of an evaluation."""

import json
from pathlib import Path

import pytest

from lesft.wilson import wilson_interval
from lesft_client.evaluation.report import (
    Origin,
    make_report,
    summary,
    write_report,
)
from tests.evaluation.test_predictions import prediction

ORIGIN = Origin(
    benchmark="gsm8k",
    model="lesft/fake",
    model_fingerprint="sha256:" + "0" * 64,
    prompt_fingerprint="sha256:1",
    data_digest="sha256:2",
    prompt="chat",
    shots=0,
    answer="strict",
    settings={"shots": 0},
)


def _predictions() -> list:  # type: ignore[type-arg]
    readings = [("4", "4"), ("5", "4"), (None, "4"), (None, None)]
    return [
        prediction(index).model_copy(
            update={
                "extracted": strict,
                "right": strict == "4",
                "readings": {"strict": strict, "flexible": flexible},
                "finish_reason": "length" if index == 3 else "stop",
                "tokens": 10,
                "seconds": 2.0,
            }
        )
        for index, (strict, flexible) in reversed(list(enumerate(readings)))
    ]


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # By hand and as statsmodels' proportion_confint(method="wilson") has them.
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)


def test_a_report_has_the_figures_of_all_predictions() -> None:
    report = make_report(ORIGIN, _predictions())
    assert (report.right, report.questions, report.accuracy) == (1, 4, 0.25)
    assert report.accuracy_by_reading == {"strict": 0.25, "flexible": 0.75}
    assert report.without_answer == 0.5
    assert report.cut_off == 0.25
    assert (report.tokens, report.seconds, report.tokens_per_second) == (40, 8.0, 5.0)
    assert [each.index for each in report.predictions] == [0, 1, 2, 3]
    assert report.versions["python"].startswith("3.")


def test_the_summary_is_a_short_table() -> None:
    assert summary(make_report(ORIGIN, _predictions())) == (
        "model             lesft/fake (sha256:000000000000)\n"
        "benchmark         gsm8k, 4 questions, 0 shots, chat prompt\n"
        "accuracy          25.0% (1/4), 95% 4.6% to 69.9%, answer read as strict\n"
        "read otherwise    flexible 75.0%\n"
        "without an answer 50.0%\n"
        "cut at max_tokens 25.0%\n"
        "written           40 tokens in 8.0 s, 5.0 tokens/s"
    )


def test_the_files_hold_report_and_table(tmp_path: Path) -> None:
    report = make_report(ORIGIN, _predictions())
    write_report(report, tmp_path)
    data = json.loads((tmp_path / "evaluation.json").read_text())
    assert data == report.model_dump(mode="json")
    page = (tmp_path / "evaluation.md").read_text()
    assert page.startswith("# gsm8k: lesft/fake\n\n| | |\n|---|---|\n| model | lesft/fake")
    assert page.endswith("| strict | 25.0% |\n| flexible | 75.0% |\n")
