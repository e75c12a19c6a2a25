"""What came of a run: report.json from the figures that the services left."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lesft_testbed.questions import Questions, accuracy, nll_per_token
from lesft_testbed.settings import RunSettings

REPORT_FILE = "report.json"

_NOT_OF_THE_RUN = {"output", "config", "cache", "progress"}
_PACKAGES = ("lesft", "torch", "transformers", "peft", "grpcio", "safetensors", "numpy")


class Report(BaseModel):
    """report.json. Losses are in nats, sizes in bytes unless the name says another unit."""

    method: str
    settings: dict[str, Any]
    """All settings of the run, but for where its results and fetched models go."""
    model: str
    dataset: str
    clients: int
    """Those that trained: one where the data is pooled."""
    cut_layer: int | None
    """Null where the model was not split."""
    rounds: int
    samples_per_client: int
    """As was asked for; the mean where the shares' sizes differ."""
    samples_by_client: list[int]
    """Without the skipped ones."""
    labels_by_client: list[dict[str, int]]
    """Samples by what the skew is over or else by kind of problem; empty where there is none."""
    skipped_samples: int
    """Samples of all clients that were longer than max_length."""
    loss_by_round: list[float]
    """The loss that was trained on, the mean over clients by data share."""
    nll_by_round: list[float]
    """Mean -log P per target token of the same micro-batches, with dropout."""
    class_counts_by_round: list[tuple[int, int, int] | None]
    """Salient, sub-salient and irrelevant target tokens of all clients."""
    seconds_by_round: list[float] = []
    """From one round's end to the next one's, as the server has it; without a server by looking
    twice a second."""
    heldout_nll_before: float | None
    """Mean -log P per held-out target token, given the base prompt; null where none is held out."""
    heldout_nll_after: float | None
    accuracy_before: float | None
    """Share of test questions that are answered right, greedily; null where none were asked."""
    accuracy_after: float | None
    accuracy_questions: int
    accuracy_interval_before: tuple[float, float] | None
    """Wilson's 95% confidence interval."""
    accuracy_interval_after: tuple[float, float] | None
    test_nll_before: float | None
    """Mean -log P per target token of the test questions' own solutions; null where not measured.
    questions.json has it question by question."""
    test_nll_after: float | None
    data_sha256: str = ""
    """Of the data file or the folder's `*.jsonl` as the run began; empty for a data set's name."""
    questions_digest: str | None = None
    """Over the test questions after, as in evaluation.json; null where none were asked."""
    adapters: list[str]
    """Folders of PEFT adapters, relative to the output: one, or one of each client."""
    client_parameters: int
    """Model parameters that a client held, of the client with the most."""
    client_trained_parameters: int
    wire: dict[str, dict[str, int]]
    """Bytes of all clients by kind; `up` is from client to server or aggregator."""
    seconds: dict[str, float]
    """Wall time of the run's stages and `total`; `training_...` are parts of `training`, as the
    mean over clients, `training_wait_...` what their loops have waited for."""
    server_seconds: dict[str, float] = {}
    """All rounds by what the model did or waited for; empty without a server."""
    peak_rss_mib: dict[str, float]
    versions: dict[str, str]
    seed: int

    @property
    def is_skewed(self) -> bool:
        """Whether the clients' shares of the data were made to differ."""
        skewed: bool = self.settings["skew"] != "none" and self.clients > 1
        return skewed


def make_report(
    settings: RunSettings,
    spec: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    questions: Questions,
    adapters: Sequence[str],
    seconds: Mapping[str, float],
    peak_rss_bytes: Mapping[str, int],
    data_sha256: str,
) -> Report:
    """The report of a finished run.

    `settings` as they were given, `spec` is the run_spec.json, `rounds` of a `RoundLog`, `results`
    the clients' result.json, `questions` what became of them.
    """
    return Report(
        method=settings.method,
        settings=settings.model_dump(mode="json", exclude=_NOT_OF_THE_RUN),
        model=spec["model_name"],
        dataset=settings.data,
        clients=len(results),
        cut_layer=spec["cut_layer"] if settings.split else None,
        rounds=len(rounds),
        samples_per_client=settings.as_trained().samples,
        samples_by_client=[result["num_samples"] for result in results],
        labels_by_client=[result["samples_by_label"] for result in results],
        skipped_samples=sum(result["skipped_samples"] for result in results),
        loss_by_round=[record["loss"] for record in rounds],
        nll_by_round=[record["nll"] for record in rounds],
        class_counts_by_round=[record["class_counts"] for record in rounds],
        seconds_by_round=[record["seconds"] for record in rounds],
        heldout_nll_before=_held_out(results, "held_out_before"),
        heldout_nll_after=_held_out(results, "held_out_after"),
        **_of_questions(questions),
        data_sha256=data_sha256,
        adapters=list(adapters),
        client_parameters=max(result["parameters"] for result in results),
        client_trained_parameters=max(result["trained_parameters"] for result in results),
        wire=_wire(results),
        seconds={
            "starting": seconds["starting"],
            **_stages(results),
            "questions": seconds["questions"],
            "total": seconds["total"],
        },
        server_seconds=_device_seconds(rounds),
        peak_rss_mib={name: round(size / 2**20, 1) for name, size in peak_rss_bytes.items()},
        versions={"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        seed=settings.seed,
    )


def _of_questions(questions: Questions) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "accuracy_questions": len(questions.after or ()),
        "questions_digest": questions.digest,
    }
    for when, asked in (("before", questions.before), ("after", questions.after)):
        found = accuracy(asked or ())
        share, interval = found or (None, None)
        figures[f"accuracy_{when}"] = share
        figures[f"accuracy_interval_{when}"] = interval
        figures[f"test_nll_{when}"] = nll_per_token(asked or ())
    return figures


def _held_out(results: Sequence[Mapping[str, Any]], name: str) -> float | None:
    tokens = sum(result[name]["tokens"] for result in results)
    return sum(result[name]["nll_sum"] for result in results) / tokens if tokens else None


def _wire(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    return {
        kind: {way: sum(result["wire"][way][kind] for result in results) for way in ("up", "down")}
        for kind in results[0]["wire"]["up"]
    }


def _device_seconds(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    by_round = [record.get("device_seconds", {}) for record in rounds]
    states = dict.fromkeys(state for seconds in by_round for state in seconds)
    return {state: sum(seconds.get(state, 0.0) for seconds in by_round) for state in states}


_STAGES = ("preparing", "held_out_before", "training", "held_out_after")


def _stages(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Stages last as long as the slowest client's; the training's own phases are means."""
    names = dict.fromkeys(name for result in results for name in result["seconds"])
    return {
        name if name in _STAGES else f"training_{name}": (
            max(result["seconds"][name] for result in results)
            if name in _STAGES
            else sum(result["seconds"].get(name, 0.0) for result in results) / len(results)
        )
        for name in names
    }


def write_report(report: Report, output: Path) -> None:
    """Write report.json."""
    (output / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n")
