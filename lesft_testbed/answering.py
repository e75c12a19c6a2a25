"""Test questions, put by `lesft-client evaluate` to the model as it was and as training left it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from lesft_testbed.commands import client_name, evaluate_command
from lesft_testbed.display import Display
from lesft_testbed.processes import Process, Processes
from lesft_testbed.questions import Question, Questions, questions_of
from lesft_testbed.settings import RunSettings
from lesft_testbed.watch import ServiceView

_EVALUATION_FILE = "evaluation.json"
_POLL_SECONDS = 0.5


def ask_questions(
    settings: RunSettings, model: str, adapters: Sequence[Path], display: Display
) -> Questions:
    """What became of the questions, before and after.

    With several adapters, one of each client, each answers its share of the questions. Nothing of
    the run is lost when that fails: its log says why, and there are no questions then.
    """
    questions: Questions = {}
    for when in ("before", "after"):
        if settings.questions == 0 or (when == "before" and not settings.measure_before):
            continue
        display.say(f"{settings.questions} test questions, to the model as it was {when}")
        answered = _ask(settings, model, when, [None] if when == "before" else adapters, display)
        if answered is None:
            return {}
        questions[when] = answered
    return questions


def _ask(
    settings: RunSettings, model: str, when: str, adapters: Sequence[Path | None], display: Display
) -> list[Question] | None:
    """All questions, each to one of the adapters; None when one of the evaluations failed."""
    evaluations = []
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
            if process.exit_status != 0:
                last = process.log_tail(1)
                display.say(f"no answers: {last} ({process.log} has the details)")
                return None
            evaluations.append(json.loads((output / _EVALUATION_FILE).read_text()))
    return questions_of(evaluations)


def _view(process: Process) -> ServiceView:
    """How many questions are answered, once it says so."""
    last = process.log_tail(1)
    state = last if " questions  " in last else "answering"
    return ServiceView(process.name, state, process.measure_memory())
