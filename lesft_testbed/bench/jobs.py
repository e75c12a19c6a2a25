"""What parts start: commands of this project and programs of the bench, one at a time."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lesft.errors import RunStopped
from lesft_testbed.bench.part import Bench
from lesft_testbed.commands import options, program
from lesft_testbed.comparison.schedule import Job, Schedule
from lesft_testbed.processes import Processes
from lesft_testbed.report import REPORT_FILE, Report

_POLL_SECONDS = 0.1
_REQUEST, _ANSWER = "request.json", "answer.json"
_DRAWN_BY = ("data", "seed", "samples", "max_length", "accumulation", "batch_size")


def run_training(bench: Bench, name: str, run: Mapping[str, Any]) -> Report:
    """`lesft-testbed run` with these options, without test questions; the report of it.

    Whatever `run` does not say is as the command has it. Raises RunStopped when it fails.
    """
    settings, folder = bench.settings, bench.scratch / name
    always = {
        "output": folder,
        "cache": settings.cache,
        "model": bench.model,
        "data": settings.data,
        "samples": settings.samples,
        "seed": settings.seed,
        "server_threads": settings.num_threads,
        "client_threads": settings.num_threads,
        "weights": "local",  # handed out once a device, not once an epoch
        "held_out": 0,
        "questions": 0,
        "progress": "lines",
    }
    _run(bench, name, [program("lesft-testbed"), "run", *options({**always, **run})])
    return Report.model_validate_json((folder / REPORT_FILE).read_bytes())


def run_program(
    bench: Bench, name: str, module: str, request: Mapping[str, Any], python: str = sys.executable
) -> dict[str, Any]:
    """A module of the bench in a process of its own: JSON in, JSON out.

    `python` may lack this project where the module does not need it. Raises RunStopped when it
    fails.
    """
    folder = bench.scratch / name
    folder.mkdir(exist_ok=True)
    (folder / _REQUEST).write_text(json.dumps(request))
    files = [str(folder / _REQUEST), str(folder / _ANSWER)]
    program_file = str(Path(__file__).with_name(f"{module}.py"))
    # Isolated, or the names of the bench's own modules would go before others'.
    _run(bench, name, [python, "-I", program_file, *files])
    answer: dict[str, Any] = json.loads((folder / _ANSWER).read_text())
    return answer


def drawn_samples(bench: Bench, report: Report) -> dict[str, Any]:
    """What the clients of a finished run have drawn; see `lesft_testbed.bench.drawn`."""
    settings = {name: report.settings[name] for name in _DRAWN_BY}
    run = {"model": bench.model, "clients": report.clients, "rounds": report.rounds}
    return run_program(bench, "drawn", "drawn", {**settings, **run})


def start_service(processes: Processes, name: str, command: Sequence[str]) -> str:
    """Its gRPC address, once it listens there. Raises RunStopped when a service fails."""
    process = processes.start(name, command)
    while (address := process.address("grpc")) is None:
        processes.check()
        time.sleep(_POLL_SECONDS)
    return address


def _run(bench: Bench, name: str, command: list[str]) -> None:
    schedule = Schedule(
        bench.output,
        1,
        problem=lambda job: "",
        on_start=lambda job: None,
        on_end=lambda job, seconds, failure: None,
    )
    for failure in schedule.run([Job(name, command)]):
        raise RunStopped(f"{failure.name} {failure.reason}")
