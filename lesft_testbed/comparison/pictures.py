"""The comparison's pictures. Colours and marks are the same for a method in all of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from lesft_testbed.comparison.axes import (
    AXES,
    Series,
    ablations,
    described,
    rivals,
    series_along,
    where,
)
from lesft_testbed.comparison.page import Picture
from lesft_testbed.comparison.plan import FEW_SHOT, UNTUNED, ZERO_SHOT, Place
from lesft_testbed.comparison.results import Cell, Comparison, Measure
from lesft_testbed.comparison.statistics import Estimate

_NAMES: dict[Measure, str] = {
    "accuracy": "accuracy (higher is better)",
    "nll": "test solutions, $-$log P, nats per token (lower is better)",
}
_GREY = "#6f6f6f"
_COLOURS = {
    "lesft": "#0072B2",
    "splitlora": "#D55E00",
    "sl": "#E69F00",
    "splitfrozen": "#009E73",
    "fedavg": "#CC79A7",
    "centralized": "#000000",
    "dft": "#56B4E9",
}
"""Okabe and Ito's palette, which is told apart with any colour vision."""
_MORE_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c6d31")
_MARKS = "osD^vP*XhdpH"
_Cost = Callable[[Cell], float | None]
_LINES = {ZERO_SHOT: ":", FEW_SHOT: "--"}

_TITLE_CHARACTERS = 48
"""That a panel holds in a line."""


def draw_pictures(comparison: Comparison, folder: Path) -> list[Picture]:
    """Write all pictures that the comparison has figures for; returns what was written."""
    drawn = _Pictures(comparison, folder)
    drawn.by_method("methods.png", rivals(comparison), "By method")
    drawn.by_method("ablations.png", ablations(comparison), "Ablations")
    for axis, about in AXES.items():
        drawn.along(f"{axis}.png", series_along(comparison, axis), about)
    drawn.against_bytes("bytes.png")
    drawn.against_time("time.png")
    return drawn.written


class _Pictures:
    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self._comparison = comparison
        self._folder = folder
        self._style = _styles(comparison.methods)
        self._measures = comparison.measures
        self.written: list[Picture] = []

    # ------------------------------------------------------------------ by method

    def by_method(self, file: str, methods: Sequence[str], caption: str) -> None:
        """A row of panels for each place, a line for each method."""
        places = [p for p in self._comparison.places if self._has_figures(p, methods)]
        if not places or not methods:
            return
        height = 0.9 + 0.3 * len(methods)
        figure, panels = self._panels(len(places), height, same_scale=True)
        for row, place in zip(panels, places, strict=True):
            for axes, measure in zip(row, self._measures, strict=True):
                self._methods(axes, place, measure, methods)
            _set_title(row, described(place))
        for axes, measure in zip(panels[-1], self._measures, strict=True):
            axes.set_xlabel(_NAMES[measure])
        self._save(figure, file, f"{caption}: mean over seeds with 95% t-interval")

    def _methods(self, axes: Axes, place: Place, measure: Measure, methods: Sequence[str]) -> None:
        for y, method in enumerate(methods):
            cell = self._comparison.cell(place, method)
            found = cell and cell.estimate(measure)
            if found:
                axes.errorbar(found.mean, y, xerr=_error(found), capsize=3, **self._style[method])
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.25)
        if measure == "accuracy":
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    # ------------------------------------------------------------------ along an axis

    def along(self, file: str, all_series: Sequence[Series], about: str) -> None:
        """A row of panels for each series, a curve for each method."""
        shown = [s for s in all_series if any(self._has_figures(p) for p in s.places)]
        if not shown or not self._measures:
            return
        figure, panels = self._panels(len(shown), 3.6)
        for row, series in zip(panels, shown, strict=True):
            for axes, measure in zip(row, self._measures, strict=True):
                self._curves(axes, series, measure)
                axes.set_xlabel(about)
            _set_title(row, series.title)
        _legend(figure, panels[0][0])
        self._save(figure, file, f"Against {about}: mean over seeds with 95% t-interval")

    def _curves(self, axes: Axes, series: Series, measure: Measure) -> None:
        tuned = [m for m in self._comparison.methods if m not in UNTUNED]
        for method in self._comparison.methods:
            points = [
                (x, found)
                for x, place in enumerate(series.places)
                if (cell := self._comparison.cell(place, method))
                and (found := cell.estimate(measure))
            ]
            if points and method in UNTUNED:
                axes.axhline(points[0][1].mean, color=_GREY, linestyle=_LINES[method], label=method)
                continue
            # Side by side, so that intervals do not hide each other.
            shift = 0.05 * (tuned.index(method) - (len(tuned) - 1) / 2)
            xs = [x + shift for x, _ in points]
            errors = [_error(found) for _, found in points]
            both = [[e[side][0] if e else 0.0 for e in errors] for side in (0, 1)]
            means = [found.mean for _, found in points]
            style = {**self._style[method], "linestyle": "-", "linewidth": 1.2}
            axes.errorbar(xs, means, yerr=both, capsize=2, label=method, **style)
        axes.set_xticks(range(len(series.places)), series.values)
        self._figure_axis(axes, measure)

    # ------------------------------------------------------------------ against cost

    def against_bytes(self, file: str) -> None:
        """Accuracy and likelihood against what all clients sent and received."""
        figure, panels = self._against("bytes on the wire, all clients, MB", _megabytes)
        for axes in panels:
            # Some methods send nothing, others a thousand times what the next one does.
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(-0.2, axes.get_xlim()[1] * 1.5)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if panels:
            self._save(figure, file, "Against bytes on the wire")

    def against_time(self, file: str) -> None:
        """The same against the seconds of training."""
        seconds = {run.name: run.measured.seconds.get("training") for run in self._comparison.runs}

        def training_seconds(cell: Cell) -> float | None:
            values = [value for name in cell.runs if (value := seconds[name]) is not None]
            return sum(values) / len(values) if values else None

        figure, panels = self._against("seconds of training on this machine", training_seconds)
        for axes in panels:
            axes.set_xlim(left=0)
        if panels:
            self._save(figure, file, "Against time of training", measured=True)

    def _against(self, about: str, cost: _Cost) -> tuple[Figure, list[Axes]]:
        """A figure and its panels; without panels where there is nothing to draw."""
        names = list(dict.fromkeys(where(place) for place in self._comparison.places))
        if not self._measures or not any(c.method not in UNTUNED for c in self._comparison.cells):
            return Figure(), []
        figure, panels = self._panels(len(names), 3.6)
        for row, name in zip(panels, names, strict=True):
            for axes, measure in zip(row, self._measures, strict=True):
                self._costs(axes, name, measure, cost)
                axes.set_xlabel(about)
            _set_title(row, name)
        _legend(figure, panels[0][0])
        return figure, [axes for row in panels for axes in row]

    def _costs(self, axes: Axes, name: str, measure: Measure, cost: _Cost) -> None:
        """A point for each place; a thin line joins those of a method."""
        for method in self._comparison.methods:
            cells = [
                c for c in self._comparison.cells if c.method == method and where(c.place) == name
            ]
            found = [
                (x, estimate)
                for cell in cells
                if (estimate := cell.estimate(measure)) and (x := cost(cell)) is not None
            ]
            if cells and method in UNTUNED:
                first = cells[0].estimate(measure)
                if first:
                    axes.axhline(first.mean, color=_GREY, linestyle=_LINES[method], label=method)
                continue
            found.sort(key=lambda point: point[0])
            for number, (x, estimate) in enumerate(found):
                label = None if number else method
                style = self._style[method]
                axes.errorbar(
                    x, estimate.mean, yerr=_error(estimate), capsize=2, label=label, **style
                )
            axes.plot(
                [x for x, _ in found],
                [estimate.mean for _, estimate in found],
                color=self._style[method]["color"],
                linewidth=0.7,
            )
        self._figure_axis(axes, measure)

    # ------------------------------------------------------------------ parts

    def _has_figures(self, place: Place, methods: Sequence[str] = ()) -> bool:
        cells = [self._comparison.cell(place, m) for m in methods or self._comparison.methods]
        return any(c and c.estimate(measure) for c in cells for measure in self._measures)

    def _panels(
        self, rows: int, height: float, same_scale: bool = False
    ) -> tuple[Figure, list[list[Axes]]]:
        columns = len(self._measures)
        figure = Figure(figsize=(5.2 * columns, height * rows + 0.6), layout="constrained")
        panels = [
            list(row)
            for row in figure.subplots(
                rows, columns, squeeze=False, sharex="col" if same_scale else "none"
            )
        ]
        for axes in (axes for row in panels for axes in row):
            axes.spines[["top", "right"]].set_visible(False)
        return figure, panels

    def _figure_axis(self, axes: Axes, measure: Measure) -> None:
        axes.set_ylabel(_NAMES[measure], fontsize=8)
        axes.grid(axis="y", alpha=0.25)
        if measure == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(7))

    def _save(self, figure: Figure, file: str, caption: str, measured: bool = False) -> None:
        # Without the time of drawing and the library's version, it is the same file each time.
        figure.savefig(self._folder / file, dpi=150, metadata={"Software": None})
        self.written.append(Picture(file, caption, measured))


def _error(found: Estimate) -> list[list[float]] | None:
    if found.low is None or found.high is None:
        return None
    return [[found.mean - found.low], [found.high - found.mean]]


def _megabytes(cell: Cell) -> float | None:
    return cell.total_bytes / 1e6


def _set_title(row: Sequence[Axes], text: str) -> None:
    """Of a row of panels, over the first one; in lines that its width holds."""
    row[0].set_title(fill(text, _TITLE_CHARACTERS * len(row)), fontsize=10, loc="left")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=4)


def _styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and mark by method."""
    more = 0
    styles: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(methods):
        if method in UNTUNED:
            colour = _GREY
        elif method in _COLOURS:
            colour = _COLOURS[method]
        else:
            colour = _MORE_COLOURS[more % len(_MORE_COLOURS)]
            more += 1
        mark = _MARKS[number % len(_MARKS)]
        styles[method] = {"color": colour, "marker": mark, "markersize": 6, "linestyle": "none"}
    return styles
