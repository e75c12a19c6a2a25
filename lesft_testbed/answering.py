"""Test questions, put by `lesft-client evaluate` to the model as it was and as training left it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lesft_testbed.commands import client_name, evaluate_command
from lesft_testbed.display import Display
from lesft_testbed.processes import Process, Processes
from lesft_testbed.questions import Questions, questions_of
from lesft_testbed.settings import RunSettings
from lesft_testbed.watch import ServiceView

_EVALUATION_FILE = "evaluation.json"
_EMPTY_SHARE = "questions has none"
"""What `lesft-client evaluate` says of a share that is empty."""
_POLL_SECONDS = 0.5


def ask_questions(
    settings: RunSettings, model: str, adapters: Sequence[Path], display: Display
) -> Questions:
    """What became of the questions, before and after.

    With several adapters, one of each client, each answers its share of the questions. Nothing of
    the run is lost when that fails: its log says why, and there are no questions then.
    """
    if settings.questions == 0:
        return Questions()
    before: list[dict[str, Any]] | None = None
    if settings.measure_before:
        before = _ask(settings, model, "before", [None], display)
        if before is None:
            return Questions()
    after = _ask(settings, model, "after", adapters, display)
    if after is None:
        return Questions()
    return Questions(
        before=None if before is None else questions_of(before),
        after=questions_of(after),
        digest=after[0]["data_digest"],
    )


def _ask(
    settings: RunSettings, model: str, when: str, adapters: Sequence[Path | None], display: Display
) -> list[dict[str, Any]] | None:
    """Evaluations of all questions, each by one of the adapters; None when one of them failed."""
    display.say(f"{settings.questions} test questions, to the model as it was {when}")
    evaluations: list[dict[str, Any]] = []
    with Processes(settings.output) as processes:
        # With fewer questions than clients the last clients have none.
        for index, adapter in enumerate(adapters[: settings.questions]):
            whose = f"-{client_name(index)}" if len(adapters) > 1 else ""
            name = f"questions-{when}{whose}"
            output = processes.state_of(name)
            share = (index + 1, len(adapters))
            command = evaluate_command(settings, model, output, adapter, share)
            process = processes.start(name, command)
            while process.exit_status is None:
                display.services([_view(process)])
                time.sleep(_POLL_SECONDS)
            last = process.log_tail(1)
            if process.exit_status != 0 and evaluations and _EMPTY_SHARE in last:
                # The data has fewer questions than were asked for; how many, only it knows.
                break
            if process.exit_status != 0:
                display.say(f"no answers: {last} ({process.log} has the details)")
                return None
            evaluations.append(json.loads((output / _EVALUATION_FILE).read_text()))
    return evaluations


def _view(process: Process) -> ServiceView:
    """How many questions are answered, once it says so."""
    last = process.log_tail(1)
    state = last if " questions  " in last else "answering"
    return ServiceView(process.name, state, process.measure_memory())
