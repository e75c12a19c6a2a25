"""What came of a run: report.json and report.md from the figures that the services left."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.filesize import decimal

REPORT_FILE = "report.json"
PAGE_FILE = "report.md"
PICTURE_FILE = "loss.png"
ADAPTER_FOLDER = "adapter"

_PACKAGES = ("lesft", "torch", "transformers", "peft", "grpcio", "safetensors", "numpy")


class Accuracy(BaseModel):
    """How many test questions were answered right: an evaluation.json, or what is needed of it."""

    questions: int
    accuracy: float
    interval: tuple[float, float]


class Report(BaseModel):
    """report.json. Losses are in nats, sizes in bytes unless the name says another unit."""

    method: str
    model: str
    dataset: str
    clients: int
    cut_layer: int
    rounds: int
    samples_per_client: int
    skipped_samples: int
    """Samples of all clients that were longer than max_length."""
    loss_by_round: list[float]
    """The loss that was trained on: token-weighted, the mean over clients by data share."""
    nll_by_round: list[float]
    """Mean -log P per target token of the same micro-batches, with dropout."""
    class_counts_by_round: list[tuple[int, int, int] | None]
    """Salient, sub-salient and irrelevant target tokens of all clients."""
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
    wire: dict[str, dict[str, int]]
    """Bytes of all clients by kind; `up` is from client to server or aggregator."""
    seconds: dict[str, float]
    """Wall time of the run's stages and `total`; `training_...` are parts of `training`, as the
    mean over clients."""
    peak_rss_mib: dict[str, float]
    versions: dict[str, str]
    seed: int


def make_report(
    spec: Mapping[str, Any],
    dataset: str,
    samples_per_client: int,
    rounds: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    accuracy: Mapping[str, Accuracy],
    seconds: Mapping[str, float],
    peak_rss_bytes: Mapping[str, int],
) -> Report:
    """The report of a finished run.

    `spec` is the server's run_spec.json, `rounds` its /v1/rounds, `results` the clients'
    result.json, `accuracy` what was found "before" and "after", or empty.
    """
    before, after = accuracy.get("before"), accuracy.get("after")
    return Report(
        method="lesft",
        model=spec["model_name"],
        dataset=dataset,
        clients=spec["clients"],
        cut_layer=spec["cut_layer"],
        rounds=len(rounds),
        samples_per_client=samples_per_client,
        skipped_samples=sum(result["skipped_samples"] for result in results),
        loss_by_round=[record["loss"] for record in rounds],
        nll_by_round=[record["nll"] for record in rounds],
        class_counts_by_round=[record["class_counts"] for record in rounds],
        heldout_nll_before=_held_out(results, "held_out_before"),
        heldout_nll_after=_held_out(results, "held_out_after"),
        accuracy_before=before and before.accuracy,
        accuracy_after=after and after.accuracy,
        accuracy_questions=after.questions if after else 0,
        accuracy_interval_before=before and before.interval,
        accuracy_interval_after=after and after.interval,
        wire=_wire(results),
        seconds={"starting": seconds["starting"], **_stages(results), "total": seconds["total"]},
        peak_rss_mib={name: round(size / 2**20, 1) for name, size in peak_rss_bytes.items()},
        versions={"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        seed=spec["seed"],
    )


def _held_out(results: Sequence[Mapping[str, Any]], name: str) -> float | None:
    tokens = sum(result[name]["tokens"] for result in results)
    return sum(result[name]["nll_sum"] for result in results) / tokens if tokens else None


def _wire(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    return {
        kind: {way: sum(result["wire"][way][kind] for result in results) for way in ("up", "down")}
        for kind in results[0]["wire"]["up"]
    }


_STAGES = ("preparing", "held_out_before", "training", "held_out_after")


def _stages(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Stages last as long as the slowest client's; the training's own phases are means."""
    names = results[0]["seconds"]
    return {
        name if name in _STAGES else f"training_{name}": (
            max(result["seconds"][name] for result in results)
            if name in _STAGES
            else sum(result["seconds"][name] for result in results) / len(results)
        )
        for name in names
    }


def write_report(report: Report, output: Path) -> None:
    """Write report.json and report.md."""
    (output / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n")
    (output / PAGE_FILE).write_text(page(report))


def page(report: Report) -> str:
    """The report as Markdown, with the picture beside it."""
    losses = report.loss_by_round
    lines = [
        f"# {report.clients} clients fine-tuned {report.model} on {Path(report.dataset).name}",
        "",
        f"{report.rounds} rounds, {report.samples_per_client} samples per client, cut after layer "
        f"{report.cut_layer}, seed {report.seed}. The joined PEFT adapter is in "
        f"`{ADAPTER_FOLDER}/`, every figure in `{REPORT_FILE}`.",
        "",
        f"![Loss by round]({PICTURE_FILE})",
        "",
        "| | before | after |",
        "|---|---:|---:|",
        f"| held-out -log P per target token | {_nats(report.heldout_nll_before)} "
        f"| {_nats(report.heldout_nll_after)} |",
        f"| accuracy on {report.accuracy_questions} test questions, 95% interval "
        f"| {_share(report.accuracy_before, report.accuracy_interval_before)} "
        f"| {_share(report.accuracy_after, report.accuracy_interval_after)} |",
        f"| training loss, first and last round | {losses[0]:.4f} | {losses[-1]:.4f} |",
        "",
        "| bytes on the wire, all clients | up | down |",
        "|---|---:|---:|",
        *(
            f"| {kind.replace('_', ' ')} | {decimal(ways['up'])} | {decimal(ways['down'])} |"
            for kind, ways in report.wire.items()
        ),
        "",
        "| stage | seconds |",
        "|---|---:|",
        *(f"| {name.replace('_', ' ')} | {value:.1f} |" for name, value in report.seconds.items()),
        "",
        "| service | peak resident memory, MiB |",
        "|---|---:|",
        *(f"| {name} | {value:.0f} |" for name, value in report.peak_rss_mib.items()),
        "",
        f"Versions: {', '.join(f'{name} {v}' for name, v in report.versions.items())}.",
    ]
    return "\n".join(lines) + "\n"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(share: float | None, interval: tuple[float, float] | None) -> str:
    return "-" if share is None else f"{share:.0%} ({_interval(interval)})"


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"


def summary(report: Report, output: Path) -> str:
    """What the command prints at its end."""
    lines = [f"{report.clients} clients, {report.rounds} rounds in {report.seconds['total']:.0f} s"]
    lines.append(
        f"training loss                      {report.loss_by_round[0]:.4f} -> "
        f"{report.loss_by_round[-1]:.4f}"
    )
    if report.heldout_nll_before is not None:
        lines.append(
            f"held-out -log P per target token   {_nats(report.heldout_nll_before)} -> "
            f"{_nats(report.heldout_nll_after)}"
        )
    if report.accuracy_after is not None:
        lines.append(
            f"accuracy, {report.accuracy_questions} test questions".ljust(35)
            + f"{report.accuracy_before:.0%} -> {report.accuracy_after:.0%}   "
            f"(95%: {_interval(report.accuracy_interval_before)} -> "
            f"{_interval(report.accuracy_interval_after)})"
        )
    for name, what in (
        (PAGE_FILE, "tables and picture"),
        (REPORT_FILE, "every figure, for programs"),
        (PICTURE_FILE, "loss by round"),
        (f"{ADAPTER_FOLDER}/", "PEFT adapter of the whole model"),
    ):
        lines.append(f"  {output / name!s:<40} {what}")
    lines.append(f"use it:  lesft-testbed serve --output {output}")
    return "\n".join(lines)
