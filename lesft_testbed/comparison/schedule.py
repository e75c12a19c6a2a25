"""Runs commands, several at once, until all are done; whatever happens, it ends what it started."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from lesft.files import write_atomically

_POLL_SECONDS = 0.2
_STOP_SECONDS = 40
"""A run ends its own services within fifteen seconds, and may have two sets of them."""
_LOG_LINES = 15
_RUNNING_FILE = "running.json"
_LOGS_FOLDER = "logs"
_OWN_VARIABLES = "LESFT_"
"""A run has all its settings from its command: the comparison's variables are not meant for it."""


@dataclass(frozen=True)
class Job:
    """One command to run."""

    name: str
    command: Sequence[str]


class Failure(NamedTuple):
    """A job that did not end well."""

    name: str
    reason: str
    """How it ended, and the end of its log."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    started: float


class Schedule:
    """Jobs of one comparison; their logs are in `output`/logs."""

    def __init__(
        self,
        output: Path,
        at_once: int,
        problem: Callable[[Job], str],
        on_start: Callable[[Job], None],
        on_end: Callable[[Job, float, Failure | None], None],
    ) -> None:
        """`problem` says what is wrong with the results of a job that has ended well, or nothing.

        `on_end` hears how many seconds a job took, and of its failure where it has failed.
        """
        self._output = output
        self._at_once = at_once
        self._problem = problem
        self._on_start = on_start
        self._on_end = on_end
        self._running: list[_Running] = []

    def run(self, jobs: Iterable[Job]) -> list[Failure]:
        """Run all; returns those that failed. When it is interrupted, it ends what is running."""
        waiting = list(jobs)
        failures: list[Failure] = []
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._at_once:
                    self._start(waiting.pop(0))
                time.sleep(_POLL_SECONDS)
                failures += self._take_ended()
        finally:
            self._stop()
        return failures

    def _start(self, job: Job) -> None:
        log = self._output / _LOGS_FOLDER / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_OWN_VARIABLES)}
        with log.open("w") as file:
            print("$", *job.command, file=file, flush=True)
            # A session of its own: Ctrl-C in the terminal reaches the comparison only, which then
            # ends the runs in order.
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self._running.append(_Running(job, process, log, time.monotonic()))
        self._note_running()
        self._on_start(job)

    def _take_ended(self) -> list[Failure]:
        ended = [each for each in self._running if each.process.poll() is not None]
        failures = []
        for each in ended:
            self._running.remove(each)
            self._note_running()
            failure = self._failure(each)
            self._on_end(each.job, time.monotonic() - each.started, failure)
            if failure:
                failures.append(failure)
        return failures

    def _failure(self, ended: _Running) -> Failure | None:
        status = ended.process.returncode
        how = _how_it_ended(status) if status else self._problem(ended.job)
        if not how:
            return None
        lines = ended.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return Failure(ended.job.name, "\n".join([f"{how}; the end of {ended.log}:", *lines]))

    def _stop(self) -> None:
        end_processes([psutil.Process(e.process.pid) for e in self._running if _runs(e.process)])
        self._running.clear()
        self._note_running()

    def _note_running(self) -> None:
        """For the next comparison in this folder, should this one be killed."""
        records = []
        for each in self._running:
            with suppress(psutil.Error):
                started = psutil.Process(each.process.pid).create_time()
                records.append({"pid": each.process.pid, "started": started})
        write_atomically(self._output / _RUNNING_FILE, json.dumps(records).encode())


def _runs(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def _how_it_ended(status: int) -> str:
    return f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"


def end_leftovers(output: Path) -> int:
    """End the runs that a killed comparison has left behind; returns how many there were.

    They are known by process id and start time, so that no other process is meant.
    """
    try:
        records: list[Mapping[str, float]] = json.loads((output / _RUNNING_FILE).read_bytes())
    except FileNotFoundError:
        return 0
    left = []
    for record in records:
        with suppress(psutil.Error):
            process = psutil.Process(int(record["pid"]))
            if process.create_time() == record["started"]:
                left.append(process)
    end_processes(left)
    return len(left)


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """Ask all to end and wait for them; after 40 seconds kill them with all that they started."""
    for process in processes:
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_SECONDS)
    for process in alive:
        with suppress(psutil.Error):
            for each in (*process.children(recursive=True), process):
                with suppress(psutil.Error):
                    each.kill()
    psutil.wait_procs(alive, timeout=_STOP_SECONDS)
