"""`lesft-testbed bench`: measure the parts that are not finished, keep each, show them all."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lesft.commands import say
from lesft.errors import InvalidInput, LesftError, RunStopped
from lesft.files import write_atomically
from lesft_testbed.bench.measuring import measure, recorded_settings
from lesft_testbed.bench.parts import make_part
from lesft_testbed.bench.results import (
    BENCH_FILE,
    BenchReport,
    FailedPart,
    difference,
    read_report,
)
from lesft_testbed.bench.settings import BenchSettings
from lesft_testbed.bench.wording import PAGE_FILE, PICTURE_FILE, figure_line, figure_table
from lesft_testbed.comparison.schedule import end_leftovers
from lesft_testbed.comparison.wording import duration
from lesft_testbed.output import locked_output

_SCRATCH = ".measuring"


def bench(settings: BenchSettings) -> str:
    """Measure all parts that are asked for and not finished; return what to print.

    What is finished is on disk after each part. Raises InvalidInput for a folder with results of
    other settings that are not to be replaced; RunStopped when parts have failed, once the others
    are done.
    """
    output = settings.output
    with locked_output(output, "lesft-testbed bench"):
        report = read_report(output)
        wanted = settings.parts
        if not settings.replace:
            _refuse_to_replace(report, settings)
            finished = [name for name in wanted if report.part(name)]
            wanted = tuple(name for name in wanted if name not in finished)
            if finished:
                say(f"finished already: {', '.join(finished)}")
        end_leftovers(output)
        try:
            for name in wanted:
                report = _measured(report, name, settings)
                _write(report, output)
        except KeyboardInterrupt:
            say("what is finished is kept; the same command goes on from there")
            raise
        if not wanted:
            _write(report, output)
    failed = [each for each in report.failed if each.name in wanted]
    table = _closing_words(report, output)
    if failed:
        say(table)
        reasons = "\n".join(f"{each.name}: {each.reason}" for each in failed)
        raise RunStopped(f"{len(failed)} of {len(wanted)} parts failed:\n{reasons}")
    return table


def _refuse_to_replace(report: BenchReport, settings: BenchSettings) -> None:
    for name in settings.parts:
        part = report.part(name)
        if part and (
            other := difference(part.settings, recorded_settings(settings, make_part(name)))
        ):
            raise InvalidInput(
                f"{settings.output / BENCH_FILE} has {name} with other settings: {other}. What is "
                "finished is not overwritten: give another --output, or --replace to measure again"
            )


# ---------------------------------------------------------------------- one part


def _measured(report: BenchReport, name: str, settings: BenchSettings) -> BenchReport:
    """The report with one more part, or with its failure."""
    part, start = make_part(name), time.monotonic()
    say(f"{name}: {part.about}")
    try:
        with _scratch(settings.output) as scratch:
            result = measure(part, settings, scratch)
    except (LesftError, OSError) as error:
        say(f"{name} failed: {error}")
        return report.with_failure(FailedPart(name=name, reason=str(error)))
    for figure in result.figures:
        say(f"{name}: {figure_line(figure)}")
    say(f"{name}: done in {duration(time.monotonic() - start)}")
    return report.with_part(result)


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """An empty folder for the block."""
    folder = output / _SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------- the results


def _write(report: BenchReport, output: Path) -> None:
    """bench.json first: it is what the next run of the command goes on from."""
    write_atomically(output / BENCH_FILE, report.model_dump_json(indent=1).encode() + b"\n")
    # matplotlib takes a second to load; only here.
    from lesft_testbed.bench.page import page
    from lesft_testbed.bench.picture import draw_figures

    if report.parts:
        draw_figures(report, output / PICTURE_FILE)
    write_atomically(output / PAGE_FILE, page(report).encode())


def _closing_words(report: BenchReport, output: Path) -> str:
    lines = [*figure_table(report)]
    for file, what in (
        (PAGE_FILE, "tables and picture"),
        (BENCH_FILE, "every figure, for programs"),
        (PICTURE_FILE, "figures against their targets"),
    ):
        lines.append(f"  {output / file!s:<40} {what}")
    return "\n".join(lines)
