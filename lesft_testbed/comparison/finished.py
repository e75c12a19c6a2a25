"""All of a plan's runs: which are finished, which are not, and which are of something else."""

from dataclasses import dataclass, field
from pathlib import Path

from lesft_testbed.comparison.command_lines import run_folder
from lesft_testbed.comparison.figures import (
    FinishedRun,
    NotFinished,
    OtherData,
    OtherSettings,
    read_run,
)
from lesft_testbed.comparison.plan import FEW_SHOT, ZERO_SHOT, Plan, PlannedRun


@dataclass
class PlannedResults:
    """What is there of a plan, each run by its name and in the plan's order."""

    finished: dict[str, FinishedRun] = field(default_factory=dict)
    others: dict[str, OtherSettings] = field(default_factory=dict)
    """Results that stand where this plan's are to be, of other settings or other data."""
    missing: dict[str, NotFinished] = field(default_factory=dict)


def read_plan(plan: Plan, output: Path) -> PlannedResults:
    """The results of all planned runs below the comparison's folder."""
    results = PlannedResults()
    for run in plan.runs:
        try:
            results.finished[run.name] = read_run(run, output)
        except OtherSettings as difference:
            results.others[run.name] = difference
        except NotFinished as reason:
            results.missing[run.name] = reason
    _set_untuned_of_other_data_apart(plan, output, results)
    return results


def _set_untuned_of_other_data_apart(plan: Plan, output: Path, results: PlannedResults) -> None:
    """Put the untuned model's runs among the others where the trained ones' data is not theirs.

    An evaluation has no digest of the data's file, but one of its questions, which the trained
    models were asked, too.
    """
    for run in plan.runs:
        is_there = run.kind == "untuned" and run.name in results.finished
        if is_there and _is_of_other_data(run, plan, results):
            del results.finished[run.name]
            results.others[run.name] = OtherData(
                f"{run_folder(output, run)} has answered questions of other data: {run.data} has "
                "changed since"
            )


def _is_of_other_data(run: PlannedRun, plan: Plan, results: PlannedResults) -> bool:
    trained = [
        each.name
        for each in plan.runs
        if each.kind == "training" and (each.data, each.seed) == (run.data, run.seed)
    ]
    asked = {
        results.finished[name].figures.questions_digest
        for name in trained
        if name in results.finished
    } - {None}  # of reports of before there was a digest, which are taken to match
    if run.method == ZERO_SHOT and asked:
        return results.finished[run.name].figures.questions_digest not in asked
    if run.method == FEW_SHOT and _differs_from_zero_shot(run, plan, results):
        return True
    return any(isinstance(results.others.get(name), OtherData) for name in trained)


def _differs_from_zero_shot(run: PlannedRun, plan: Plan, results: PlannedResults) -> bool:
    """Whether the questions of the two rows differ: few-shot's digest is over its examples, too."""
    [zero_shot] = [
        each.name
        for each in plan.runs
        if each.method == ZERO_SHOT
        and (each.model, each.data, each.seed) == (run.model, run.data, run.seed)
    ]
    if zero_shot in results.others:
        return True
    rows = [results.finished[name] for name in (run.name, zero_shot) if name in results.finished]
    asked = {(*row.answers, *(question.nll_tokens for question in row.questions)) for row in rows}
    return len(asked) > 1
