"""Measuring a part: its alternatives by turns, and its figures of what came out."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lesft.commands import say
from lesft_testbed.bench.machine import this_machine
from lesft_testbed.bench.part import Alternative, Bench, Figure, Part, Values
from lesft_testbed.bench.results import FigureResult, Measurement, PartResult
from lesft_testbed.bench.settings import BenchSettings
from lesft_testbed.default_model import default_model


def measure(part: Part, settings: BenchSettings, scratch: Path) -> PartResult:
    """All its alternatives, by turns, as often as asked for, and its figures.

    Raises LesftError as the part does.
    """
    model = settings.model
    if not model and "model" in part.depends_on:
        model = str(default_model(settings.cache, say))
    machine = this_machine(settings.num_threads)
    began, start = datetime.now(timezone.utc), time.monotonic()
    repeats = 1 if part.is_exact else settings.repeats
    measurements: list[Measurement] = []
    bench = Bench(settings, model, settings.output, scratch)
    with part.alternatives(bench) as alternatives:
        for measurement in by_turns(alternatives, repeats):
            measurements.append(measurement)
            _show(part, measurement, len(measurements), repeats * len(alternatives))
    machine.versions.update(bench.versions)
    return PartResult(
        name=part.name,
        about=part.about,
        settings=recorded_settings(settings, part),
        model=Path(model).name if "model" in part.depends_on else "",
        began=began.isoformat(timespec="seconds"),
        seconds=time.monotonic() - start,
        machine=machine,
        figures=[figure_result(figure, measurements) for figure in part.figures],
        measurements=measurements,
    )


def recorded_settings(settings: BenchSettings, part: Part) -> dict[str, Any]:
    """All settings that a part depends on, flat."""
    values = {**settings.model_dump(mode="json"), "threads": settings.num_threads}
    names = part.depends_on if part.is_exact else ("repeats", *part.depends_on)
    own: Mapping[str, Any] = values.get(part.name, {})
    return {
        **{name: values[name] for name in names},
        **{f"{part.name}.{option}": value for option, value in own.items()},
    }


def by_turns(alternatives: Sequence[Alternative], repeats: int) -> Iterator[Measurement]:
    """All alternatives once, then all again: what slows the machine down meets each of them."""
    for repeat in range(repeats):
        for each in alternatives:
            yield Measurement(alternative=each.name, repeat=repeat, values=dict(each.measure()))


def _show(part: Part, measurement: Measurement, done: int, count: int) -> None:
    values = ", ".join(f"{name} {value:.6g}" for name, value in measurement.values.items())
    say(f"[{done}/{count}] {part.name}, {measurement.alternative}: {values}")


# ---------------------------------------------------------------------- figures


def figure_result(figure: Figure, measurements: Sequence[Measurement]) -> FigureResult:
    """A figure of medians, its spread over the repeats, and whether it reaches its target."""
    value = figure.compute(_medians(measurements))
    by_repeat = [figure.compute(values) for values in _repeats(measurements)]
    return FigureResult(
        name=figure.name,
        what=figure.what,
        value=value,
        by_repeat=by_repeat,
        low=min(by_repeat),
        high=max(by_repeat),
        target=figure.target,
        at_least=figure.at_least,
        met=figure.is_met(value),
    )


def _medians(measurements: Sequence[Measurement]) -> Values:
    """Of each alternative's values, over the repeats."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(each.alternative for each in measurements):
        of_one = [each.values for each in measurements if each.alternative == name]
        found[name] = {
            value: statistics.median(values[value] for values in of_one) for value in of_one[0]
        }
    return found


def _repeats(measurements: Sequence[Measurement]) -> list[Values]:
    """The values repeat by repeat."""
    return [
        {each.alternative: each.values for each in measurements if each.repeat == repeat}
        for repeat in sorted({each.repeat for each in measurements})
    ]
