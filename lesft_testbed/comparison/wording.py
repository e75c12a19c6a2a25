"""How the comparison's figures are written, on the page and on the terminal."""

from collections.abc import Sequence

from lesft_testbed.comparison.results import Cell, Measure
from lesft_testbed.comparison.statistics import Estimate

NAMES: dict[Measure, str] = {"accuracy": "Accuracy", "nll": "Test solutions, -log P per token"}
"""Not "held-out": that is what a run's clients call their own samples."""
_SMALLEST_P = 0.0001


def summary(cell: Cell | None, measure: Measure) -> str:
    """Mean and interval of a cell, or a dash."""
    found = cell and cell.estimate(measure)
    if not found:
        return "-"
    if found.low is None:
        return value(found.mean, measure)
    return f"{value(found.mean, measure)} ({interval(found, measure)})"


def interval(found: Estimate, measure: Measure) -> str:
    """The interval of an estimate; a dash for one value."""
    if found.low is None or found.high is None:
        return "-"
    return f"{value(found.low, measure)} to {value(found.high, measure)}"


def value(number: float, measure: Measure) -> str:
    """Percent, or nats with four places."""
    return f"{100 * number:.1f}%" if measure == "accuracy" else f"{number:.4f}"


def difference(number: float, measure: Measure) -> str:
    """Percentage points, or nats with four places, with its sign."""
    return f"{100 * number:+.1f} points" if measure == "accuracy" else f"{number:+.4f}"


def p_value(p: float | None) -> str:
    """Four places; a dash where there was no test."""
    if p is None:
        return "-"
    return f"<{_SMALLEST_P}" if p < _SMALLEST_P else f"{p:.4f}"


def count(number: int | None) -> str:
    """With commas; a dash where it is not known."""
    return "-" if number is None else f"{number:,}"


def plural(number: int, what: str) -> str:
    """So many of what."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """Seconds, minutes, or hours and minutes."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
