"""`lesft-testbed compare`: plan, run what is not finished, and show what came out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lesft.commands import say
from lesft.errors import InvalidInput, RunStopped
from lesft.files import write_atomically
from lesft_testbed.comparison.capacity import num_layers, runs_at_once
from lesft_testbed.comparison.command_lines import command_line, from_home, installed
from lesft_testbed.comparison.figures import NotFinished, read_run
from lesft_testbed.comparison.finished import PlannedResults, read_plan
from lesft_testbed.comparison.manifest import MANIFEST, write_manifest
from lesft_testbed.comparison.plan import Plan, PlannedRun, make_plan
from lesft_testbed.comparison.presets import LAYERS
from lesft_testbed.comparison.results import Comparison, Missing, make_comparison
from lesft_testbed.comparison.schedule import Failure, Job, Schedule, end_leftovers
from lesft_testbed.comparison.settings import CompareSettings
from lesft_testbed.comparison.terminal import COMPARISON_FILE, PAGE_FILE, Progress, closing_words
from lesft_testbed.comparison.wording import plural
from lesft_testbed.default_model import NAME as DEFAULT_MODEL
from lesft_testbed.default_model import default_model
from lesft_testbed.output import locked_output

_DEFAULT_MODEL_LAYERS = 30
_NOT_RECORDED = {"config", "output", "cache", "jobs", "replace", "manifest_only", "collect"}


def compare(settings: CompareSettings) -> str:
    """Run all that is planned and not finished, write the results, return what to print.

    Raises InvalidInput for a plan that cannot be, a folder that another comparison uses, or one
    with results of other settings that are not to be replaced; RunStopped when runs have failed,
    once the others are done and the results are written.
    """
    output = settings.output
    default_folder = from_home(settings.cache / "models" / DEFAULT_MODEL)
    plan = make_plan(settings, _layers(settings, default_folder), default_folder)
    if settings.collect:
        comparison = _write_results(plan, settings)
        return closing_words(comparison, output)
    with locked_output(output, "lesft-testbed compare", "; --collect shows what it has so far"):
        results = read_plan(plan, output)
        if not settings.replace:
            _refuse_to_replace(results, output)
        write_manifest(plan, output, settings.cache)
        if settings.manifest_only:
            return f"{len(plan.runs)} runs: {output / MANIFEST}"
        if "" in settings.models:
            default_model(settings.cache, say)
        failures = _run_the_rest(plan, results, settings)
        comparison = _write_results(plan, settings)
    if failures:
        names = "\n  ".join(each.name for each in failures)
        raise RunStopped(
            f"{len(failures)} of {len(plan.runs)} runs failed, see {output / 'logs'}. "
            f"{output / PAGE_FILE} shows the others; the same command runs these again:\n  {names}"
        )
    return closing_words(comparison, output)


def _layers(settings: CompareSettings, default_folder: str) -> dict[str, int]:
    found = {model: num_layers(model) for model in settings.models if model}
    known = {model: layers for model, layers in found.items() if layers}
    return {**LAYERS, default_folder: _DEFAULT_MODEL_LAYERS, **known}


def _refuse_to_replace(results: PlannedResults, output: Path) -> None:
    """Raise InvalidInput where a planned run would overwrite a finished one of something else."""
    if not results.others:
        return
    first, *more = results.others.values()
    besides = f" (and so {plural(len(more), 'more run')})" if more else ""
    raise InvalidInput(
        f"{first}{besides}. What is finished is not overwritten: give another --output than "
        f"{output}, or --replace to run it again"
    )


# ---------------------------------------------------------------------- the runs


def _run_the_rest(plan: Plan, results: PlannedResults, settings: CompareSettings) -> list[Failure]:
    """Run what is not finished; on an interruption, say how to go on."""
    output = settings.output
    left_behind = end_leftovers(output)
    if left_behind:
        say(f"ended {plural(left_behind, 'run')} that an earlier comparison had left behind")
    for difference in results.others.values():
        say(f"{difference}: it is run again")
    rest = [run for run in plan.runs if run.name not in results.finished]
    finished = len(results.finished)
    at_once = settings.jobs or runs_at_once(plan.runs, settings.device)
    if finished:
        say(f"{finished} of {len(plan.runs)} runs are finished already")
    if not rest:
        return []
    say(f"{plural(len(rest), 'run')} to do, {at_once} at once")
    progress = Progress(rest, output, at_once)
    planned = {run.name: run for run in rest}
    schedule = Schedule(
        output,
        at_once,
        lambda job: _problem(planned[job.name], output),
        progress.started,
        progress.ended,
    )
    try:
        return schedule.run(_jobs(rest, settings))
    except KeyboardInterrupt:
        say(
            f"{finished + progress.done} of {len(plan.runs)} runs are finished; the same command "
            "goes on from there"
        )
        raise


def _problem(run: PlannedRun, output: Path) -> str:
    try:
        read_run(run, output)
    except NotFinished as reason:
        return f"ended well, but {reason}"
    return ""


def _jobs(runs: Sequence[PlannedRun], settings: CompareSettings) -> Iterator[Job]:
    for run in runs:
        yield Job(run.name, installed(command_line(run, settings.output, settings.cache)))


# ---------------------------------------------------------------------- the results


def _write_results(plan: Plan, settings: CompareSettings) -> Comparison:
    """comparison.json, comparison.md and pictures, of what is there."""
    output = settings.output
    results = read_plan(plan, output)
    reasons = {**results.others, **results.missing}
    missing = [
        Missing(name=run.name, reason=str(reasons[run.name]))
        for run in plan.runs
        if run.name in reasons
    ]
    recorded: dict[str, Any] = settings.model_dump(mode="json", exclude=_NOT_RECORDED)
    comparison = make_comparison(
        recorded, settings.reference_method, plan, results.finished, missing
    )
    # matplotlib takes a second to load; only here.
    from lesft_testbed.comparison.page import page
    from lesft_testbed.comparison.pictures import draw_pictures

    pictures = draw_pictures(comparison, output)
    write_atomically(output / PAGE_FILE, page(comparison, pictures).encode())
    write_atomically(
        output / COMPARISON_FILE, comparison.model_dump_json(indent=1).encode() + b"\n"
    )
    return comparison
