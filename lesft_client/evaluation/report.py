"""What came of an evaluation: evaluation.json for programs, evaluation.md for people."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lesft.files import write_atomically
from lesft.wilson import wilson_interval
from lesft_client.data.answer_values import same_answer
from lesft_client.evaluation.predictions import Prediction

REPORT_FILE = "evaluation.json"
PAGE_FILE = "evaluation.md"

_PACKAGES = ("lesft", "torch", "transformers", "tokenizers", "peft")


class Origin(BaseModel):
    """What was evaluated, and with what."""

    benchmark: str
    model: str
    model_fingerprint: str
    prompt_fingerprint: str
    """The same where wording, template and examples are the same."""
    data_digest: str
    """Over questions, examples, solutions and answers."""
    prompt: str
    shots: int
    measure: str = "accuracy"
    """accuracy, likelihood or both; what was not measured is null."""
    share: str = "1/1"
    """Which of several equal shares of the questions was asked."""
    answer: str
    """How the answer was read: `accuracy` counts by this reading."""
    settings: dict[str, Any]


class EvaluationReport(Origin):
    """evaluation.json. Shares lie between 0 and 1."""

    questions: int
    right: int | None
    accuracy: float | None
    interval: tuple[float, float] | None
    """Wilson's 95% confidence interval of the accuracy."""
    accuracy_by_reading: dict[str, float]
    """By every way to read the same texts."""
    without_answer: float | None
    """Share of texts in which the chosen reading found no answer."""
    nll_per_token: float | None
    """-log P per token of the data's own solutions, in nats: the sum over all questions' tokens by
    their number."""
    nll_tokens: int
    """These tokens."""
    prompt_tokens: int
    tokens: int
    """Tokens that the model wrote."""
    seconds: float
    """Wall-clock time of all the command's runs, without the loading of the model."""
    tokens_per_second: float
    cut_off: float | None
    """Share of texts that reached max_tokens."""
    versions: dict[str, str]
    predictions: list[Prediction]


def make_report(origin: Origin, predictions: Sequence[Prediction]) -> EvaluationReport:
    """The figures of all predictions, one at least."""
    count = len(predictions)
    asked = [prediction for prediction in predictions if prediction.right is not None]
    right = sum(prediction.right is True for prediction in asked)
    nll_tokens = sum(prediction.nll_tokens for prediction in predictions)
    tokens = sum(prediction.tokens for prediction in predictions)
    seconds = sum(prediction.seconds for prediction in predictions)
    return EvaluationReport(
        **origin.model_dump(),
        questions=count,
        right=right if asked else None,
        accuracy=right / count if asked else None,
        interval=wilson_interval(right, count) if asked else None,
        accuracy_by_reading=_accuracy_by_reading(predictions),
        without_answer=sum(p.extracted is None for p in asked) / count if asked else None,
        nll_per_token=_nll(predictions) / nll_tokens if nll_tokens else None,
        nll_tokens=nll_tokens,
        prompt_tokens=sum(prediction.prompt_tokens for prediction in predictions),
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 2) if seconds else 0.0,
        cut_off=sum(p.finish_reason == "length" for p in asked) / count if asked else None,
        versions=_versions(),
        predictions=sorted(predictions, key=lambda prediction: prediction.index),
    )


def summary(report: EvaluationReport) -> str:
    """A short table for the terminal, without a line feed at its end."""
    rows = _rows(report)
    width = max(map(len, rows)) + 1
    return "\n".join(f"{name:{width}}{value}" for name, value in rows.items())


def write_report(report: EvaluationReport, folder: Path) -> None:
    """evaluation.json and evaluation.md, each whole or not there."""
    page = [f"# {report.benchmark}: {report.model}", "", "| | |", "|---|---|"]
    page += [f"| {name} | {value} |" for name, value in _rows(report).items()]
    if len(report.accuracy_by_reading) > 1:
        page += ["", "| answer read as | accuracy |", "|---|---|"]
        page += [f"| {name} | {_percent(x)} |" for name, x in report.accuracy_by_reading.items()]
    write_atomically(folder / REPORT_FILE, report.model_dump_json(indent=2).encode() + b"\n")
    write_atomically(folder / PAGE_FILE, "\n".join([*page, ""]).encode())


def _rows(report: EvaluationReport) -> dict[str, str]:
    share = "" if report.share == "1/1" else f" (share {report.share})"
    rows = {
        "model": f"{report.model} ({report.model_fingerprint[:19]})",
        "benchmark": f"{report.benchmark}, {report.questions} questions{share}, {report.shots} "
        f"shots, {report.prompt} prompt",
    }
    if report.accuracy is not None and report.interval is not None:
        low, high = report.interval
        rows["accuracy"] = (
            f"{_percent(report.accuracy)} ({report.right}/{report.questions}), "
            f"95% {_percent(low)} to {_percent(high)}, answer read as {report.answer}"
        )
    others = [
        f"{name} {_percent(share)}"
        for name, share in report.accuracy_by_reading.items()
        if name != report.answer
    ]
    if others:
        rows["read otherwise"] = ", ".join(others)
    return rows | _rows_of_texts(report) | _rows_of_solutions(report) | _rows_of_time(report)


def _rows_of_texts(report: EvaluationReport) -> dict[str, str]:
    if report.without_answer is None or report.cut_off is None or not report.tokens:
        return {}
    return {
        "without an answer": _percent(report.without_answer),
        "cut at max_tokens": _percent(report.cut_off),
    }


def _rows_of_solutions(report: EvaluationReport) -> dict[str, str]:
    if report.nll_per_token is None:
        return {}
    return {
        "held-out -log P per target token": f"{report.nll_per_token:.4f} ({report.nll_tokens} "
        "tokens of the data's own solutions)"
    }


def _rows_of_time(report: EvaluationReport) -> dict[str, str]:
    if not report.tokens:
        return {"time": f"{report.seconds:.1f} s"}
    return {
        "written": f"{report.tokens} tokens in {report.seconds:.1f} s, "
        f"{report.tokens_per_second:.1f} tokens/s"
    }


def _accuracy_by_reading(predictions: Sequence[Prediction]) -> dict[str, float]:
    return {
        name: sum(same_answer(each.readings[name], each.expected) for each in predictions)
        / len(predictions)
        for name in predictions[0].readings
    }


def _nll(predictions: Sequence[Prediction]) -> float:
    # In the order of the questions: a sum's last bits depend on it, and answers come in any order.
    ordered = sorted(predictions, key=lambda prediction: prediction.index)
    return sum(prediction.nll or 0.0 for prediction in ordered)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
