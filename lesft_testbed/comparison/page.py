"""comparison.md: the comparison for people. What differs each time is in its last section."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.filesize import decimal

from lesft_testbed.comparison.axes import AXES, Series, described, series_along
from lesft_testbed.comparison.figures import RunFigures
from lesft_testbed.comparison.notes import how_to_read, repeated_questions, threads
from lesft_testbed.comparison.paper import PaperFigure, figures_for
from lesft_testbed.comparison.plan import UNTUNED, Place
from lesft_testbed.comparison.results import Cell, Comparison, Measure
from lesft_testbed.comparison.wording import (
    NAMES,
    count,
    difference,
    interval,
    p_value,
    plural,
    row,
    summary,
    value,
)


@dataclass(frozen=True)
class Picture:
    """A picture's file, and what it shows."""

    file: str
    caption: str
    measured: bool = False
    """Whether it shows what differs each time."""


def page(comparison: Comparison, pictures: Sequence[Picture]) -> str:
    """The page, as Markdown, with the pictures beside it."""
    lines = [
        *_head(comparison),
        *how_to_read(comparison),
        *_pictures(pictures, measured=False),
        *_axes(comparison),
    ]
    for place in comparison.places:
        if any(comparison.cell(place, method) for method in comparison.methods):
            lines += ["", f"## {described(place)}"]
            for measure in comparison.measures:
                lines += _methods(comparison, place, measure)
            lines += _bytes(comparison, place)
    lines += [*_paper(comparison), *_measured(comparison, pictures)]
    return "\n".join(lines) + "\n"


def _head(comparison: Comparison) -> Iterator[str]:
    settings = comparison.settings
    planned = len(comparison.runs) + len(comparison.missing)
    preset = settings["preset"]
    about = "" if preset == "none" else f"Preset {preset} at {settings['scale']} scale. "
    seeds = settings["seeds"]
    yield f"# Comparison of {', '.join(m for m in comparison.methods if m not in UNTUNED)}"
    yield ""
    yield (
        f"{about}{len(comparison.runs)} of {planned} runs are finished; every figure is in "
        f"`comparison.json`, every command in `manifest.txt`. {plural(len(seeds), 'seed')} "
        f"({', '.join(map(str, seeds))}), {plural(settings['epochs'], 'epoch')}, learning rate "
        f"{settings['optimizer']['learning_rate']:g}, {settings['accumulation']} micro-batches of "
        f"{settings['batch_size']} a round, an aggregation every "
        f"{plural(settings['aggregation_interval'], 'round')}, LoRA rank "
        f"{settings['lora']['rank']}, {plural(settings['questions'], 'test question')} a seed, "
        f"{settings['shots']} examples in the few-shot row"
        + ("" if settings["skew"] == "none" else f", shares skewed by {settings['skew']}")
        + "."
    )
    if comparison.missing:
        yield ""
        yield "Not finished:"
        yield ""
        yield from (f"- `{each.name}`: {each.reason}" for each in comparison.missing)


def _pictures(pictures: Sequence[Picture], measured: bool) -> Iterator[str]:
    for picture in pictures:
        if picture.measured == measured:
            yield from ("", f"![{picture.caption}]({picture.file})")


# ---------------------------------------------------------------------- tables of one place


def _methods(comparison: Comparison, place: Place, measure: Measure) -> Iterator[str]:
    questions = "| questions " if measure == "accuracy" else ""
    yield from ("", f"### {NAMES[measure]}", "")
    yield f"| method | seeds | mean | 95% interval | difference | p | verdict {questions}|"
    yield "|---|---:|---:|---|---:|---:|---|" + ("---|" if questions else "")
    for method in comparison.methods:
        cell = comparison.cell(place, method)
        found = cell and cell.estimate(measure)
        if found:
            figures = [
                method,
                str(found.count),
                value(found.mean, measure),
                interval(found, measure),
            ]
            yield row([*figures, *_against(comparison, place, method, measure)])
    if measure == "accuracy":
        yield from repeated_questions(comparison, place)


def _against(comparison: Comparison, place: Place, method: str, measure: Measure) -> list[str]:
    test = comparison.test(place, method, measure)
    if test is None:
        empty = "reference" if method == comparison.reference else "not tested"
        if method in comparison.same_as:
            empty = f"same as {comparison.same_as[method]}"
        return ["", "", empty, *([""] if measure == "accuracy" else [])]
    by_question = test.mcnemar
    counts = []
    if measure == "accuracy":
        counts = [
            f"{by_question.only_method} : {by_question.only_reference}, p {p_value(by_question.p)}"
            if by_question
            else ""
        ]
    return [difference(test.difference.mean, measure), p_value(test.p_holm), test.verdict, *counts]


def _bytes(comparison: Comparison, place: Place) -> Iterator[str]:
    cells = [cell for method in comparison.methods if (cell := comparison.cell(place, method))]
    cells = [cell for cell in cells if cell.method not in UNTUNED]
    if not cells:
        return
    figures = {run.name: run for run in comparison.runs}
    ways = [
        (kind, way)
        for kind in cells[0].wire
        for way in ("up", "down")
        if any(_of(cell, kind, way) for cell in cells)
    ]
    yield from ("", "### Bytes on the wire, all clients, and what a client holds", "")
    titles = [f"{kind.replace('_', ' ')} {way}" for kind, way in ways]
    yield row(["method", *titles, "total", "parameters held", "trained"])
    yield "|---|" + "---:|" * (len(titles) + 3)
    for cell in cells:
        run = figures[cell.runs[0]]
        sizes = [decimal(round(_of(cell, kind, way))) for kind, way in ways]
        total = decimal(round(cell.total_bytes))
        yield row(
            [
                cell.method,
                *sizes,
                total,
                *map(count, (run.client_parameters, run.client_trained_parameters)),
            ]
        )


def _of(cell: Cell, kind: str, way: str) -> float:
    return cell.wire.get(kind, {}).get(way, 0.0)


# ---------------------------------------------------------------------- tables along an axis


def _axes(comparison: Comparison) -> Iterator[str]:
    for axis, about in AXES.items():
        for series in series_along(comparison, axis):
            for measure in comparison.measures:
                yield from ("", f"## {NAMES[measure]} by {about}", "")
                yield from (f"{series.title}.", "")
                yield from _along(comparison, series, measure)


def _along(comparison: Comparison, series: Series, measure: Measure) -> Iterator[str]:
    yield row(["method", *series.values])
    yield "|---|" + "---|" * len(series.places)
    for method in comparison.methods:
        cells = [comparison.cell(place, method) for place in series.places]
        yield row([method, *(summary(cell, measure) for cell in cells)])


# ---------------------------------------------------------------------- the paper's figures


def _paper(comparison: Comparison) -> Iterator[str]:
    figures = figures_for(comparison.settings["preset"], tuple(comparison.methods))
    if not figures or "accuracy" not in comparison.measures:
        return
    yield from ("", "## The paper's figures beside these", "")
    yield (
        "Accuracy in percent. Where the paper's model or data set is not part of this comparison, "
        "what is here stands in its place, and only the order of methods can be compared. The "
        "untuned models' figures are not the paper's but Qwen's own, with 4 examples; all of the "
        "paper's figures for LESFT are below those."
    )
    yield from ("", "| figure | paper | here |", "|---|---|---|")
    for figure in figures:
        yield row([figure.what(), figure.percent, _ours(comparison, figure)])


def _ours(comparison: Comparison, figure: PaperFigure) -> str:
    models = {place.model for place in comparison.places}
    data = {place.data for place in comparison.places}
    found: dict[tuple[str, ...], str] = {}
    for place in comparison.places:
        if (
            (figure.model not in models or place.model == figure.model)
            and (figure.data not in data or place.data == figure.data)
            and figure.samples in (None, place.samples)
            and figure.clients in (None, place.clients)
            and (cell := comparison.cell(place, figure.method))
            and cell.accuracy
        ):
            # Runs that are shown at several places are one figure.
            written = _label(comparison, place, summary(cell, "accuracy"))
            found.setdefault(tuple(cell.runs), written)
    return "<br>".join(found.values()) or "-"


# ---------------------------------------------------------------------- time and memory


def _measured(comparison: Comparison, pictures: Sequence[Picture]) -> Iterator[str]:
    yield from ("", "## Time and memory", "")
    yield "As measured on the machine that ran it; all else on this page is the same each time."
    yield from _pictures(pictures, measured=True)
    yield from threads(comparison)
    yield from ("", "| run | seconds | of these training | server, MiB | largest client, MiB |")
    yield "|---|---:|---:|---:|---:|"
    for place in comparison.places:
        for method in comparison.methods:
            cell = comparison.cell(place, method)
            if cell and method not in UNTUNED:
                runs = [run for run in comparison.runs if run.name in cell.runs]
                yield row([_label(comparison, place, method), *_costs(runs)])


def _label(comparison: Comparison, place: Place, what: str) -> str:
    """What, and where: which goes without saying where there is one place only."""
    return what if len(comparison.places) == 1 else f"{what} ({described(place)})"


def _costs(runs: Sequence[RunFigures]) -> list[str]:
    def mean(of: Callable[[RunFigures], float | None]) -> str:
        values = [value for run in runs if (value := of(run)) is not None]
        return f"{sum(values) / len(values):.0f}" if values else "-"

    def largest_client(run: RunFigures) -> float | None:
        peaks = run.measured.peak_rss_mib
        return max((p for name, p in peaks.items() if name.startswith("client-")), default=None)

    return [
        mean(lambda run: run.measured.seconds.get("total")),
        mean(lambda run: run.measured.seconds.get("training")),
        mean(lambda run: run.measured.peak_rss_mib.get("server")),
        mean(largest_client),
    ]
