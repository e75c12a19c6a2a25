"""What came of an evaluation: evaluation.json for programs, evaluation.md for people."""

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lesft.files import write_atomically
from lesft_client.data.answer_values import same_answer
from lesft_client.evaluation.predictions import Prediction

REPORT_FILE = "evaluation.json"
PAGE_FILE = "evaluation.md"

_PACKAGES = ("lesft", "torch", "transformers", "tokenizers", "peft")
_STANDARD_ERRORS_OF_95_PERCENT = 1.959963984540054


class Origin(BaseModel):
    """What was evaluated, and with what."""

    benchmark: str
    model: str
    model_fingerprint: str
    prompt_fingerprint: str
    """The same where wording, template and examples are the same."""
    data_digest: str
    """Over questions, examples and answers."""
    prompt: str
    shots: int
    answer: str
    """How the answer was read: `accuracy` counts by this reading."""
    settings: dict[str, Any]


class EvaluationReport(Origin):
    """evaluation.json. Shares lie between 0 and 1."""

    questions: int
    right: int
    accuracy: float
    interval: tuple[float, float]
    """Wilson's 95% confidence interval of the accuracy."""
    accuracy_by_reading: dict[str, float]
    """By every way to read the same texts."""
    without_answer: float
    """Share of texts in which the chosen reading found no answer."""
    prompt_tokens: int
    tokens: int
    """Tokens that the model wrote."""
    seconds: float
    """Wall-clock time of all the command's runs, without the loading of the model."""
    tokens_per_second: float
    cut_off: float
    """Share of texts that reached max_tokens."""
    versions: dict[str, str]
    predictions: list[Prediction]


def make_report(origin: Origin, predictions: Sequence[Prediction]) -> EvaluationReport:
    """The figures of all predictions, one at least."""
    count = len(predictions)
    right = sum(prediction.right for prediction in predictions)
    tokens = sum(prediction.tokens for prediction in predictions)
    seconds = sum(prediction.seconds for prediction in predictions)
    return EvaluationReport(
        **origin.model_dump(),
        questions=count,
        right=right,
        accuracy=right / count,
        interval=wilson_interval(right, count),
        accuracy_by_reading=_accuracy_by_reading(predictions),
        without_answer=sum(each.extracted is None for each in predictions) / count,
        prompt_tokens=sum(prediction.prompt_tokens for prediction in predictions),
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 2) if seconds else 0.0,
        cut_off=sum(each.finish_reason == "length" for each in predictions) / count,
        versions=_versions(),
        predictions=sorted(predictions, key=lambda prediction: prediction.index),
    )


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson, JASA 22, 1927), of `count` >= 1 trials."""
    z = _STANDARD_ERRORS_OF_95_PERCENT
    share = right / count
    center = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def summary(report: EvaluationReport) -> str:
    """A short table for the terminal, without a line feed at its end."""
    return "\n".join(f"{name:18}{value}" for name, value in _rows(report).items())


def write_report(report: EvaluationReport, folder: Path) -> None:
    """evaluation.json and evaluation.md, each whole or not there."""
    page = [f"# {report.benchmark}: {report.model}", "", "| | |", "|---|---|"]
    page += [f"| {name} | {value} |" for name, value in _rows(report).items()]
    if len(report.accuracy_by_reading) > 1:
        page += ["", "| answer read as | accuracy |", "|---|---|"]
        page += [f"| {name} | {_percent(x)} |" for name, x in report.accuracy_by_reading.items()]
    write_atomically(folder / REPORT_FILE, report.model_dump_json(indent=2).encode() + b"\n")
    write_atomically(folder / PAGE_FILE, "\n".join([*page, ""]).encode())


def _rows(report: EvaluationReport) -> Mapping[str, str]:
    low, high = report.interval
    rows = {
        "model": f"{report.model} ({report.model_fingerprint[:19]})",
        "benchmark": f"{report.benchmark}, {report.questions} questions, {report.shots} shots, "
        f"{report.prompt} prompt",
        "accuracy": f"{_percent(report.accuracy)} ({report.right}/{report.questions}), "
        f"95% {_percent(low)} to {_percent(high)}, answer read as {report.answer}",
    }
    others = {
        name: share for name, share in report.accuracy_by_reading.items() if name != report.answer
    }
    if others:
        rows["read otherwise"] = ", ".join(f"{name} {_percent(x)}" for name, x in others.items())
    if report.tokens:
        rows["without an answer"] = _percent(report.without_answer)
        rows["cut at max_tokens"] = _percent(report.cut_off)
        rows["written"] = (
            f"{report.tokens} tokens in {report.seconds:.1f} s, {report.tokens_per_second:.1f} "
            "tokens/s"
        )
    else:
        rows["time"] = f"{report.seconds:.1f} s"
    return rows


def _accuracy_by_reading(predictions: Sequence[Prediction]) -> dict[str, float]:
    return {
        name: sum(same_answer(each.readings[name], each.expected) for each in predictions)
        / len(predictions)
        for name in predictions[0].readings
    }


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
