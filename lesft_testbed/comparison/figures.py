"""What a finished run has left: its figures, and whether they are of the run that is planned."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lesft_testbed.comparison.command_lines import run_folder
from lesft_testbed.comparison.plan import PlannedRun
from lesft_testbed.methods import METHODS
from lesft_testbed.questions import Question, nll_per_token, questions_of

_TRAINING_FILE, _QUESTIONS_FILE, _UNTUNED_FILE = "report.json", "questions.json", "evaluation.json"
_TIMED_KIND = "other"
"""Bytes on the wire that depend on how long a run lasted, such as signs of life."""


class Measured(BaseModel):
    """What is never the same twice."""

    seconds: dict[str, float]
    peak_rss_mib: dict[str, float] = {}
    """By service."""
    other_bytes: dict[str, int] = {}
    """What went over the wire besides the kinds in `wire`, up and down."""


class RunFigures(BaseModel):
    """One finished run."""

    name: str
    kind: str
    method: str
    """The first of its names, where it is shown under several."""
    model: str
    data: str
    seed: int
    questions: int
    right: int | None
    accuracy: float | None
    """Share of the questions that were answered right."""
    nll_per_token: float | None
    """Mean -log P of the test questions' solutions in nats per token."""
    nll_tokens: int
    data_sha256: str = ""
    """Of the data that it trained on, where that is a file or folder."""
    questions_digest: str | None = None
    """Over the test questions, and the examples before them; null where that was not recorded."""
    cut_layer: int | None = None
    """Null where the model is not split."""
    rounds: int = 0
    samples_by_client: list[int] = []
    loss_by_round: list[float] = []
    nll_by_round: list[float] = []
    class_shares: list[tuple[float, float, float]] = []
    """Shares of salient, sub-salient and irrelevant target tokens by round; empty where there are
    no such classes."""
    wire: dict[str, dict[str, int]] = {}
    """Bytes of all clients by kind, up and down."""
    client_parameters: int | None = None
    """Model parameters held by a client."""
    client_trained_parameters: int | None = None
    measured: Measured


class FinishedRun(BaseModel):
    """The figures, and the questions that they are made of."""

    figures: RunFigures
    questions: list[Question]
    answers: list[str] = []
    """What would be right, question by question; for the untuned model only."""


class NotFinished(Exception):
    """There are no results of this run; the message says why."""


class OtherSettings(NotFinished):
    """There are results, but of other settings; the message names them."""


class OtherData(OtherSettings):
    """There are results, but of other data under the same name."""


def read_run(run: PlannedRun, output: Path) -> FinishedRun:
    """The results of a planned run below the comparison's folder.

    Raises OtherSettings or NotFinished.
    """
    folder = run_folder(output, run)
    if run.kind == "training":
        report = _read(folder / _TRAINING_FILE)
        expected = {**_flat(METHODS[run.method].settings()), **run.options}
        _check(expected, report, folder)
        _check_data(run, report, folder)
        asked = _read(folder / _QUESTIONS_FILE)["after"] if run.options["questions"] else []
        questions = [Question.model_validate(each) for each in asked or ()]
        _check_questions(run, questions, folder)
        return FinishedRun(figures=_of_training(run, report, questions), questions=questions)
    report = _read(folder / _UNTUNED_FILE)
    _check(run.options, report, folder)
    questions = questions_of([report])
    _check_questions(run, questions, folder)
    figures = RunFigures(
        **_common(run, questions),
        questions_digest=report["data_digest"],
        measured=Measured(seconds={"answering": report["seconds"]}),
    )
    by_index = sorted(report["predictions"], key=lambda each: each["index"])
    answers = [each["expected"] for each in by_index]
    return FinishedRun(figures=figures, questions=questions, answers=answers)


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFinished("has no results yet") from None
    except ValueError:
        raise NotFinished(f"{path} is no whole JSON file") from None
    return values


def _check(expected: Mapping[str, Any], report: Mapping[str, Any], folder: Path) -> None:
    """Raise OtherSettings unless all that is planned is what was run."""
    recorded = _flat(report.get("settings", {}))
    differing = [
        f"{name} {recorded.get(name)}, planned {value}"
        for name, value in expected.items()
        # A cut of 0 was left to the run.
        if _plain(recorded.get(name)) != _plain(value) and (name, value) != ("cut_layer", 0)
    ]
    if differing:
        raise OtherSettings(f"{folder} has other settings: {'; '.join(differing)}")


def _check_data(run: PlannedRun, report: Mapping[str, Any], folder: Path) -> None:
    """Raise OtherData unless it was trained on what lies there now.

    A report without a digest is of before there was one, and is taken to match; data that does not
    lie here, where results are only collected, cannot be compared.
    """
    then, now = report.get("data_sha256"), run.data_sha256
    if then and now and then != now:
        raise OtherData(f"{folder} was trained on other data: {run.data} has changed since")


def _check_questions(run: PlannedRun, questions: list[Question], folder: Path) -> None:
    """Raise NotFinished unless what is to be measured on test questions was."""
    if not run.options["questions"]:
        return
    measure = run.options["measure"]
    answered = any(each.right is not None for each in questions) or measure == "likelihood"
    scored = any(each.nll is not None for each in questions) or measure == "accuracy"
    what = "accuracy and likelihood" if measure == "both" else measure
    if not (answered and scored):
        raise NotFinished(f"has not measured {what} on its test questions: {folder} has its logs")


def _plain(value: Any) -> Any:
    """A setting as both sides write it: a home folder in full, a list for a tuple."""
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    return list(value) if isinstance(value, tuple) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return dict(_flat_items(values, prefix))


def _flat_items(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _common(run: PlannedRun, questions: list[Question]) -> dict[str, Any]:
    answered = [each.right for each in questions if each.right is not None]
    return {
        "name": run.name,
        "kind": run.kind,
        "method": run.method,
        "model": run.model,
        "data": run.data,
        "seed": run.seed,
        "questions": len(questions),
        "right": sum(answered) if answered else None,
        "accuracy": sum(answered) / len(answered) if answered else None,
        "nll_per_token": nll_per_token(questions),
        "nll_tokens": sum(each.nll_tokens for each in questions if each.nll is not None),
    }


def _of_training(
    run: PlannedRun, report: Mapping[str, Any], questions: list[Question]
) -> RunFigures:
    wire = {kind: ways for kind, ways in report["wire"].items() if kind != _TIMED_KIND}
    return RunFigures(
        **_common(run, questions),
        data_sha256=report.get("data_sha256", ""),
        questions_digest=report.get("questions_digest"),
        cut_layer=report.get("cut_layer") if METHODS[run.method].split else None,
        rounds=report["rounds"],
        samples_by_client=report.get("samples_by_client", []),
        loss_by_round=report["loss_by_round"],
        nll_by_round=report["nll_by_round"],
        class_shares=_shares(report["class_counts_by_round"]),
        wire=wire,
        client_parameters=report.get("client_parameters"),
        client_trained_parameters=report.get("client_trained_parameters"),
        measured=Measured(
            seconds=report["seconds"],
            peak_rss_mib=report["peak_rss_mib"],
            other_bytes=report["wire"].get(_TIMED_KIND, {}),
        ),
    )


def _shares(counts_by_round: list[list[int] | None]) -> list[tuple[float, float, float]]:
    shares = []
    for counts in counts_by_round:
        if counts and sum(counts):
            salient, near, rest = (count / sum(counts) for count in counts)
            shares.append((salient, near, rest))
    return shares
