"""What a comparison says on the terminal, while it runs and at its end."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.filesize import decimal

from lesft.commands import say
from lesft_testbed.comparison.axes import described
from lesft_testbed.comparison.capacity import TimeLeft
from lesft_testbed.comparison.figures import read_run
from lesft_testbed.comparison.manifest import MANIFEST
from lesft_testbed.comparison.plan import PlannedRun
from lesft_testbed.comparison.results import Comparison
from lesft_testbed.comparison.schedule import Failure, Job
from lesft_testbed.comparison.wording import duration, plural, summary

COMPARISON_FILE, PAGE_FILE = "comparison.json", "comparison.md"


class Progress:
    """Says what begins and ends, and how long the rest will take."""

    def __init__(self, runs: Sequence[PlannedRun], output: Path, at_once: int) -> None:
        self.done = 0
        self._output = output
        self._rest = {run.name: run for run in runs}
        self._count = len(runs)
        self._begun = 0
        self._time_left = TimeLeft(at_once)

    def started(self, job: Job) -> None:
        """A run has begun."""
        self._begun += 1
        say(f"[{self._begun}/{self._count}] {job.name}")

    def ended(self, job: Job, seconds: float, failure: Failure | None) -> None:
        """A run has ended."""
        run = self._rest.pop(job.name)
        if failure is not None:
            say(f"{job.name} failed: {failure.reason}")
            return
        self.done += 1
        self._time_left.note(run, seconds)
        left = self._time_left.seconds(list(self._rest.values()))
        rest = f"  about {duration(left)} left" if left else ""
        say(f"{job.name}: {self._outcome(run)} in {duration(seconds)}{rest}")

    def _outcome(self, run: PlannedRun) -> str:
        figures = read_run(run, self._output).figures
        parts = []
        if figures.accuracy is not None:
            parts.append(f"accuracy {100 * figures.accuracy:.1f}%")
        if figures.nll_per_token is not None:
            parts.append(f"-log P per token {figures.nll_per_token:.4f}")
        return ", ".join(parts) or "done"


def closing_words(comparison: Comparison, output: Path) -> str:
    """A table of all places and methods, and where the rest is."""
    lines = list(_table(comparison))
    if comparison.missing:
        lines.append(f"{plural(len(comparison.missing), 'run')} not finished, see {PAGE_FILE}")
    for file, what in (
        (PAGE_FILE, "tables, tests and pictures"),
        (COMPARISON_FILE, "every figure, for programs"),
        (MANIFEST, "every run's command"),
    ):
        lines.append(f"  {output / file!s:<40} {what}")
    return "\n".join(lines)


def _table(comparison: Comparison) -> Iterator[str]:
    names = {"accuracy": "accuracy", "nll": "-log P per token"}
    width = max(map(len, comparison.methods)) + 2
    for place in comparison.places:
        heading = "".join(f"{names[measure]:28}" for measure in comparison.measures)
        yield described(place)
        if heading:
            yield f"{'':{width}}{heading}".rstrip()
        for method in comparison.methods:
            cell = comparison.cell(place, method)
            figures = "".join(f"{summary(cell, m):28}" for m in comparison.measures)
            if cell and not comparison.measures:
                figures = f"{decimal(round(cell.total_bytes))} on the wire"
            yield f"{method:{width}}{figures}".rstrip()
