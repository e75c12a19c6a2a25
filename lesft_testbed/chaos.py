"""`lesft-testbed chaos`: whatever is killed or cut, the same adapters must come out."""

import statistics
from collections.abc import Callable
from pathlib import Path

from lesft.commands import say
from lesft.errors import InternalError, InvalidInput
from lesft_testbed.chaos_plan import make_plan
from lesft_testbed.chaos_result import (
    CHAOS_FILE,
    ChaosReport,
    chaos_table,
    make_chaos_report,
    write_chaos_report,
)
from lesft_testbed.chaos_run import ChaosRun, samples_in_all
from lesft_testbed.output import fresh_output
from lesft_testbed.settings import ChaosSettings
from lesft_testbed.tiny_model import save_tiny_data, save_tiny_model

_MODEL, _DATA, _CHAOS, _UNDISTURBED = "model", "data.jsonl", "chaos", "undisturbed"
_OURS = (CHAOS_FILE, _MODEL, _DATA, _CHAOS, _UNDISTURBED)


def chaos(settings: ChaosSettings) -> str:
    """Run undisturbed, then with faults, compare, and return what to print.

    The undisturbed run goes first: it tells how long a round takes, and if it fails, no fault is
    to blame. Raises RunStopped, naming the service and the end of its log, when one fails,
    InternalError when anything comes out differently, InvalidInput when the run was too short for
    all faults. chaos.json is there in the last two cases too.
    """
    with fresh_output(settings.output, _OURS):
        return _chaos(settings, say if settings.progress == "lines" else _say_nothing)


def _chaos(settings: ChaosSettings, show: Callable[[str], None]) -> str:
    output = settings.output
    model = save_tiny_model(output / _MODEL, settings.seed)
    data = save_tiny_data(output / _DATA, samples_in_all(settings))
    show(f"{settings.rounds} rounds without faults")
    undisturbed = ChaosRun(settings, output / _UNDISTURBED, model, data, show).run()
    typical_seconds = statistics.median(undisturbed.round_seconds)
    show(
        f"{settings.rounds} rounds with {settings.kills} kills and {settings.cuts} faults of links"
    )
    plan = make_plan(settings)
    chaos = ChaosRun(settings, output / _CHAOS, model, data, show, plan, typical_seconds).run()
    report = make_chaos_report(settings, chaos, undisturbed)
    write_chaos_report(report, output)
    table = chaos_table(report)
    try:
        check_report(report, output)
    except (InternalError, InvalidInput):
        say(table)
        raise
    return f"{table}\n  {output / CHAOS_FILE!s:<40} every fault and figure"


def check_report(report: ChaosReport, output: Path) -> None:
    """Raises InternalError when anything differs, InvalidInput when faults had no time to come."""
    if report.differences:
        found = "\n  ".join(report.differences)
        raise InternalError(
            "the run with faults did not come out as the undisturbed one; see "
            f"{output / CHAOS_FILE} and the logs beside it:\n  {found}"
        )
    if report.faults_left:
        raise InvalidInput(
            f"the run ended before {report.faults_left} of its faults could come: give more "
            f"--rounds than {report.rounds}"
        )


def _say_nothing(line: str) -> None:
    """For --progress none."""
