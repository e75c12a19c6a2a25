"""The report for people: report.md, and what the command prints at its end."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from lesft.spec import LossSpec
from lesft_testbed.adapters import ADAPTER_FOLDER
from lesft_testbed.methods import METHODS
from lesft_testbed.questions import QUESTIONS_FILE
from lesft_testbed.report import REPORT_FILE, Report
from lesft_testbed.serve import local_command

PAGE_FILE = "report.md"
PICTURE_FILE = "loss.png"
SHARES_FILE = "shares.png"


def write_page(report: Report, output: Path) -> None:
    """Write report.md."""
    (output / PAGE_FILE).write_text(page(report))


def page(report: Report) -> str:
    """The report as Markdown, with the pictures beside it."""
    lines = [
        f"# {_clients(report)} fine-tuned {report.model} on {Path(report.dataset).name}",
        "",
        f"Method `{report.method}` ({METHODS[report.method].title}){_deviations(report)}. "
        f"{report.rounds} rounds, {report.samples_per_client} samples per client, {_cut(report)}, "
        f"seed {report.seed}. {_adapters(report)}, every figure in `{REPORT_FILE}`.",
        "",
        f"![Loss by round]({PICTURE_FILE})",
        "",
        *_results(report),
        "",
        *_shares(report),
        *_table(
            ("bytes on the wire, all clients", "up", "down"),
            [
                (kind.replace("_", " "), decimal(ways["up"]), decimal(ways["down"]))
                for kind, ways in report.wire.items()
            ],
        ),
        "",
        *_table(
            ("parameters", "number"),
            [
                ("held by a client", f"{report.client_parameters:,}"),
                ("trained by a client", f"{report.client_trained_parameters:,}"),
            ],
        ),
        "",
        *_table(
            ("stage", "seconds"),
            [(name.replace("_", " "), f"{value:.1f}") for name, value in report.seconds.items()],
        ),
        "",
        *_table(
            ("service", "peak resident memory, MiB"),
            [(name, f"{value:.0f}") for name, value in report.peak_rss_mib.items()],
        ),
        "",
        f"Versions: {', '.join(f'{name} {v}' for name, v in report.versions.items())}.",
    ]
    return "\n".join(lines) + "\n"


def summary(report: Report, output: Path, model: str) -> str:
    """What the command prints at its end; `model` is where the base model was found."""
    method = "" if report.method == "lesft" else f"{report.method}: "
    seconds = report.seconds["total"]
    lines = [f"{method}{_clients(report)}, {report.rounds} rounds in {seconds:.0f} s"]
    lines += [f"{name:<34} {text}" for name, text in _figures(report)]
    adapters = "PEFT adapter of the whole model"
    if len(report.adapters) > 1:
        adapters = "each client's PEFT adapter of the whole model"
    for name, what in (
        (PAGE_FILE, "tables and picture"),
        (REPORT_FILE, "every figure, for programs"),
        (PICTURE_FILE, "loss by round"),
        (f"{ADAPTER_FOLDER}/", adapters),
    ):
        lines.append(f"  {output / name!s:<40} {what}")
    if report.cut_layer is None:
        lines.append(f"use it:  {local_command(output, report.adapters[0], model)}")
    else:
        lines.append(f"use it:  lesft-testbed serve --output {output}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- parts of the page


def _clients(report: Report) -> str:
    return "1 client" if report.clients == 1 else f"{report.clients} clients"


def _cut(report: Report) -> str:
    return "not split" if report.cut_layer is None else f"cut after layer {report.cut_layer}"


def _adapters(report: Report) -> str:
    if len(report.adapters) > 1:
        return f"Each client's PEFT adapter is in a folder of `{ADAPTER_FOLDER}/`"
    whole = "joined PEFT adapter" if report.cut_layer is not None else "PEFT adapter"
    return f"The {whole} is in `{ADAPTER_FOLDER}/`"


def _deviations(report: Report) -> str:
    """Settings that the method sets and the user set otherwise."""
    method = METHODS[report.method]
    loss = LossSpec(**method.loss).model_dump(mode="json")
    preset = dict(_flat({**method.settings(), "loss": loss}))
    own = {name: value for name, value in _flat(report.settings) if name in preset}
    others = [f"{name} {value}" for name, value in own.items() if value != preset[name]]
    return f", but with {', '.join(others)}" if others else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _results(report: Report) -> Iterator[str]:
    asked = f"{report.accuracy_questions} test questions"
    losses = report.loss_by_round
    rows = [
        (
            "held-out -log P per target token",
            _nats(report.heldout_nll_before),
            _nats(report.heldout_nll_after),
        ),
        (
            f"accuracy on {asked}, 95% interval",
            _share(report.accuracy_before, report.accuracy_interval_before),
            _share(report.accuracy_after, report.accuracy_interval_after),
        ),
        (
            f"-log P per target token, {asked}",
            _nats(report.test_nll_before),
            _nats(report.test_nll_after),
        ),
        ("training loss, first and last round", f"{losses[0]:.4f}", f"{losses[-1]:.4f}"),
    ]
    yield from _table(("", "before", "after"), [row for row in rows if row[1:] != ("-", "-")])
    if report.accuracy_questions:
        yield from ("", f"The test questions one by one are in `{QUESTIONS_FILE}`.")


def _shares(report: Report) -> Iterator[str]:
    if not report.is_skewed:
        return
    settings = report.settings
    yield f"![Samples of each client]({SHARES_FILE})"
    yield ""
    samples = ", ".join(map(str, report.samples_by_client))
    yield (
        f"Shares differ by {settings['skew']} (Dirichlet, alpha {settings['skew_alpha']:g}): "
        f"{samples} samples."
    )
    yield ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |".replace("|  |", "| |")
    yield f"|---|{'---:|' * (len(head) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _figures(report: Report) -> Iterator[tuple[str, str]]:
    losses = report.loss_by_round
    yield "training loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}"
    if report.heldout_nll_after is not None:
        before, after = _nats(report.heldout_nll_before), _nats(report.heldout_nll_after)
        yield "held-out -log P per target token", f"{before} -> {after}"
    if report.accuracy_after is not None:
        shares, intervals = (
            f"{report.accuracy_after:.0%}",
            _interval(report.accuracy_interval_after),
        )
        if report.accuracy_before is not None:
            shares = f"{report.accuracy_before:.0%} -> {shares}"
            intervals = f"{_interval(report.accuracy_interval_before)} -> {intervals}"
        asked = f"{report.accuracy_questions} test questions"
        yield f"accuracy, {asked}", f"{shares}   (95%: {intervals})"
    if report.test_nll_after is not None:
        nlls = _nats(report.test_nll_after)
        if report.test_nll_before is not None:
            nlls = f"{_nats(report.test_nll_before)} -> {nlls}"
        yield "solutions' -log P per target token", nlls


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(share: float | None, interval: tuple[float, float] | None) -> str:
    return "-" if share is None else f"{share:.0%} ({_interval(interval)})"


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"
