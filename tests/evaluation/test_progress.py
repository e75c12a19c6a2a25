"""What is shown while the model answers."""

import pytest

from lesft_client import counted_progress
from lesft_client.evaluation.progress import EvaluationProgress
from tests.evaluation.test_predictions import prediction


def test_without_a_terminal_a_line_comes_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([100.0, 104.0, 110.0, 110.0, 115.0])
    monkeypatch.setattr(counted_progress.time, "monotonic", lambda: next(seconds))
    earlier = [prediction(0), prediction(1).model_copy(update={"right": False})]
    with EvaluationProgress(total=8, earlier=earlier, bar=False) as display:
        display.advance(prediction(2))
        display.advance(prediction(3).model_copy(update={"right": False}))
        display.advance(prediction(4))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "going on: 2 of 8 questions are answered\n"
        "4/8 questions  50.0% right  0.6 tokens/s  20 s left\n"
    )


def test_a_bar_counts_too(capsys: pytest.CaptureFixture[str]) -> None:
    with EvaluationProgress(total=2, earlier=[], bar=True) as display:
        display.advance(prediction(0))
        display.advance(prediction(1))
    assert "2/2" in capsys.readouterr().err
