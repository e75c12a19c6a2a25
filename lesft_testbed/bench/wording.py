"""How the bench's figures are written, on the page and on the terminal."""

from collections.abc import Iterator

from lesft_testbed.bench.results import BenchReport, FigureResult

PAGE_FILE, PICTURE_FILE = "bench.md", "bench.png"


def number(value: float) -> str:
    """Three places for ratios, none for large numbers."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def target(figure: FigureResult) -> str:
    """The target with its direction."""
    return f"{'≥' if figure.at_least else '≤'} {number(figure.target)}"


def verdict(figure: FigureResult) -> str:
    """met or missed."""
    return "met" if figure.met else "missed"


def spread(figure: FigureResult) -> str:
    """Smallest and largest over the repeats; a dash for one repeat."""
    if len(figure.by_repeat) < 2:
        return "-"
    return f"{number(figure.low)} to {number(figure.high)}"


def figure_line(figure: FigureResult) -> str:
    """A figure in one line."""
    return f"{figure.name} {number(figure.value)}, target {target(figure)}: {verdict(figure)}"


def figure_table(report: BenchReport) -> Iterator[str]:
    """A table of all figures for the terminal, and the parts that failed."""
    rows = [("figure", "value", "repeats", "target", "")]
    for part in report.parts:
        for each in part.figures:
            rows.append((each.name, number(each.value), spread(each), target(each), verdict(each)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
    for failure in report.failed:
        yield f"{failure.name} could not be measured: {failure.reason.partition(chr(10))[0]}"
