"""Test questions put to several adapters, by processes of which some are made up."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lesft_testbed import answering
from lesft_testbed.answering import ask_questions
from lesft_testbed.commands import evaluate_command
from lesft_testbed.display import Display
from lesft_testbed.questions import Question, Questions
from lesft_testbed.settings import RunSettings
from tests.processes.harness import write_samples

ANSWERED = {"index": 0, "right": True, "nll": 2.0, "nll_tokens": 3, "prompt": "5e1f"}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSettings:
    """A run whose data has one test question. The first adapter's evaluation is made up."""
    monkeypatch.setattr(answering, "_POLL_SECONDS", 0.05)
    report = json.dumps({"predictions": [ANSWERED], "data_digest": "sha256:1"})

    def command(run: RunSettings, model: str, output: Path, *more: Any) -> list[str]:
        if more[1][0] > 1:
            return evaluate_command(run, model, output, *more)
        write = f"from pathlib import Path; p = Path({str(output)!r})"
        return [sys.executable, "-c", f"{write}; (p / 'evaluation.json').write_text({report!r})"]

    monkeypatch.setattr(answering, "evaluate_command", command)
    samples = [
        {"prompt": f"Add {i} and 1.", "target": f"#### {i + 1}", "answer": f"{i + 1}"}
        for i in range(10)
    ]
    data = write_samples(tmp_path / "data.jsonl", samples)
    return RunSettings(
        output=tmp_path, data=str(data), clients=3, questions=16, measure_before=False
    )


def test_an_adapter_without_a_question_is_no_failure(settings: RunSettings) -> None:
    adapters = [Path(f"client-{index}") for index in range(3)]
    found = ask_questions(settings, "no-model", adapters, Display(table=False))
    assert found == Questions(after=[Question(**ANSWERED)], digest="sha256:1")


def test_an_evaluation_that_fails_for_another_reason_leaves_no_questions(
    settings: RunSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = settings.model_copy(update={"data": "no-data.jsonl"})
    found = ask_questions(broken, "no-model", [Path("a"), Path("b")], Display(table=False))
    assert found == Questions()
    assert "no answers: lesft-client: 'no-data.jsonl' is neither" in capsys.readouterr().err
