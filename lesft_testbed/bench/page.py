"""bench.md: the figures for people."""

from collections.abc import Iterator

from lesft_testbed.bench.results import BENCH_FILE, BenchReport, PartResult
from lesft_testbed.bench.wording import PICTURE_FILE, number, spread, target, verdict
from lesft_testbed.comparison.wording import duration, row


def page(report: BenchReport) -> str:
    """The page, as Markdown, with the picture beside it."""
    lines = ["# Bench", ""]
    if report.parts:
        lines += [*_figures(report), "", f"![Figures against their targets]({PICTURE_FILE})"]
    if report.failed:
        lines += ["", "Could not be measured:", ""]
        lines += [f"- `{each.name}`: {each.reason.splitlines()[0]}" for each in report.failed]
    for part in report.parts:
        lines += ["", *_part(part)]
    return "\n".join(lines) + "\n"


def _figures(report: BenchReport) -> Iterator[str]:
    yield "| figure | what over what | value | over the repeats | target | |"
    yield "|---|---|---:|---|---:|---|"
    for part in report.parts:
        for each in part.figures:
            name, value = f"`{each.name}`", number(each.value)
            yield row([name, each.what, value, spread(each), target(each), verdict(each)])
    yield ""
    yield (
        "A value is made of the alternatives' medians over the repeats. Alternatives were measured "
        "by turns, so that what slowed the machine down met each of them. Every figure is in "
        f"`{BENCH_FILE}`."
    )


def _part(part: PartResult) -> Iterator[str]:
    machine = part.machine
    yield f"## {part.name}"
    yield ""
    on_model = f"{part.model}, m" if part.model else "M"
    yield f"{part.about} {on_model}easured on {part.began} in {duration(part.seconds)}."
    yield ""
    yield from _measurements(part)
    yield ""
    settings = ", ".join(f"{name} {value}" for name, value in part.settings.items() if value != "")
    yield f"Settings: {settings}."
    yield ""
    yield (
        f"{machine.processor}, {machine.cores} cores, {machine.memory_mib:,} MiB, "
        f"{machine.system}; {machine.torch_threads} threads a process. Load average as it began: "
        f"{', '.join(f'{load:.2f}' for load in machine.load_average)}. "
        f"{', '.join(f'{name} {version}' for name, version in machine.versions.items())}."
    )


def _measurements(part: PartResult) -> Iterator[str]:
    """One row for each value of each alternative, a column for each repeat."""
    repeats = max(each.repeat for each in part.measurements) + 1
    yield row(["alternative", "value", *(str(repeat + 1) for repeat in range(repeats))])
    yield f"|---|---|{'---:|' * repeats}"
    for first in (each for each in part.measurements if each.repeat == 0):
        for name in first.values:
            values = part.values(first.alternative, name)
            yield row([first.alternative, name.replace("_", " "), *map(number, values)])
