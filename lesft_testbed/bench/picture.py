"""bench.png: each figure against its target, every repeat a point."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lesft_testbed.bench.results import BenchReport, FigureResult
from lesft_testbed.bench.wording import number, target, verdict

_MET, _MISSED, _REPEAT = "#009E73", "#D55E00", "#6f6f6f"
_INCHES_PER_FIGURE = 0.95


def draw_figures(report: BenchReport, path: Path) -> None:
    """A strip for each figure: the side of its target shaded, repeats, and the value."""
    figures = [figure for part in report.parts for figure in part.figures]
    canvas = Figure(figsize=(8, 0.3 + _INCHES_PER_FIGURE * len(figures)), layout="constrained")
    strips = canvas.subplots(len(figures), 1, squeeze=False)[:, 0]
    for axes, figure in zip(strips, figures, strict=True):
        _draw(axes, figure)
    canvas.savefig(path, dpi=150)


def _draw(axes: Axes, figure: FigureResult) -> None:
    shown = [*figure.by_repeat, figure.value, figure.target]
    right = 1.12 * max(shown)
    axes.set_xlim(0, right)
    axes.set_ylim(-1, 1)
    good = (figure.target, right) if figure.at_least else (0, figure.target)
    axes.axvspan(*good, color=_MET, alpha=0.12, linewidth=0)
    axes.axvline(figure.target, color="black", linewidth=1)
    axes.scatter(
        figure.by_repeat, [0] * len(figure.by_repeat), s=22, color=_REPEAT, alpha=0.7, zorder=2
    )
    colour = _MET if figure.met else _MISSED
    axes.scatter([figure.value], [0], s=90, marker="D", color=colour, zorder=3)
    axes.set_title(
        f"{figure.name}: {number(figure.value)}, target {target(figure)}, {verdict(figure)}",
        fontsize=9,
        loc="left",
    )
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
