"""`lesft-testbed run`: all services of a method as processes, from start to report."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lesft.identity.certificates import write_private
from lesft.identity.commands import invite
from lesft.identity.settings import Service
from lesft_testbed.adapters import ADAPTER_FOLDER, gather_adapters
from lesft_testbed.answering import ask_questions
from lesft_testbed.commands import (
    aggregator_command,
    client_command,
    client_name,
    enrolment_tokens,
    server_command,
)
from lesft_testbed.data_digest import data_sha256
from lesft_testbed.default_model import default_model
from lesft_testbed.display import Display
from lesft_testbed.output import fresh_output
from lesft_testbed.page import PAGE_FILE, PICTURE_FILE, SHARES_FILE, summary, write_page
from lesft_testbed.processes import Process, Processes
from lesft_testbed.questions import QUESTIONS_FILE, Questions, write_questions
from lesft_testbed.report import REPORT_FILE, Report, make_report, write_report
from lesft_testbed.rounds import RESULT_FILE, RoundLog
from lesft_testbed.serve import COMMANDS_FILE, write_commands
from lesft_testbed.settings import RunSettings
from lesft_testbed.watch import Watcher

_STATE_FOLDER = "state"
_FILES = (REPORT_FILE, PAGE_FILE, PICTURE_FILE, SHARES_FILE, QUESTIONS_FILE, COMMANDS_FILE)
_OURS = (*_FILES, ADAPTER_FOLDER, _STATE_FOLDER)
_LOGS = r"(server|aggregator|endpoint|client-\d+|questions-(before|after)(-client-\d+)?)\.log"
_SPEC_FILE = "run_spec.json"
_POLL_SECONDS = 0.5


class RunCommand:
    """One run of the testbed, stage by stage."""

    def __init__(self, settings: RunSettings, display: Display) -> None:
        self._asked = settings
        self._settings = settings.as_trained()
        self._display = display
        self._clients = [client_name(index) for index in range(self._settings.clients)]
        self._seconds: dict[str, float] = {}

    def run(self) -> str:
        """Train, write the results and return what to print.

        Raises RunStopped, naming the service and the end of its log, when one fails.
        """
        with fresh_output(self._settings.output, _OURS, _LOGS):
            return self._run()

    def _run(self) -> str:
        settings, start = self._settings, time.monotonic()
        if settings.trains_nothing:
            self._display.say("every token has weight 0: nothing will be trained")
        data = data_sha256(settings.data)
        model = settings.model or str(default_model(settings.cache, self._display.say))
        with Processes(settings.output) as processes:
            watcher = Watcher(processes)
            rounds = RoundLog(processes, watcher, self._clients, settings.split)
            try:
                self._start(processes, watcher, rounds, model)
                self._seconds["starting"] = time.monotonic() - start
                self._train(processes, watcher, rounds)
            finally:
                watcher.close()
        results = [_read_json(processes.state_of(name) / RESULT_FILE) for name in self._clients]
        adapters = gather_adapters(settings, processes.state_of, self._clients, results)
        if settings.split:
            write_commands(processes, settings, model)
        questions = self._ask_questions(model, adapters)
        self._seconds["total"] = time.monotonic() - start
        holder = "server" if settings.split else self._clients[0]
        report = make_report(
            self._asked,
            _read_json(processes.state_of(holder) / _SPEC_FILE),
            rounds.records,
            results,
            questions,
            adapters,
            self._seconds,
            {name: process.peak_rss_bytes for name, process in processes.all.items()},
            data,
        )
        self._write(report, results, questions)
        return summary(report, settings.output, model)

    # ------------------------------------------------------------------ the run

    def _start(self, processes: Processes, watcher: Watcher, rounds: RoundLog, model: str) -> None:
        """Server and aggregator first, where there are any: the clients need their addresses."""
        settings, state_of = self._settings, processes.state_of
        if settings.split:
            processes.start("server", server_command(settings, model, state_of("server")))
        if settings.needs_aggregator:
            processes.start("aggregator", aggregator_command(settings, state_of("aggregator")))
        services = dict(processes.all)
        while not all(_address(service) for service in services.values()):
            self._look(processes, watcher, rounds)
        addresses = {name: _address(service) for name, service in services.items()}
        if settings.tls:
            self._invite_clients(state_of)
        for index, name in enumerate(self._clients):
            command = client_command(
                settings,
                model,
                state_of(name),
                index,
                addresses.get("server", ""),
                addresses.get("aggregator", ""),
            )
            processes.start(name, command)

    def _invite_clients(self, state_of: Callable[[str], Path]) -> None:
        """As the operators of server and aggregator would, one client after another."""
        for name in self._clients:
            for file in enrolment_tokens(self._settings, state_of(name)):
                service: Service = "server" if file.stem == "server" else "aggregator"
                ticket = invite(state_of(service), service, name)
                write_private(file, ticket.text().encode())

    def _train(self, processes: Processes, watcher: Watcher, rounds: RoundLog) -> None:
        """Watch until all clients have ended well."""
        clients = [processes.all[name] for name in self._clients]
        while any(client.exit_status is None for client in clients):
            self._look(processes, watcher, rounds)
        processes.check(may_end=self._clients)
        self._show(watcher, rounds.rest(self._settings.num_rounds))

    def _look(self, processes: Processes, watcher: Watcher, rounds: RoundLog) -> None:
        processes.check(may_end=self._clients)
        self._show(watcher, rounds.new())
        time.sleep(_POLL_SECONDS)

    def _show(self, watcher: Watcher, new_rounds: list[dict[str, Any]]) -> None:
        self._display.rounds_done(new_rounds, self._settings.num_rounds)
        self._display.services(watcher.look())

    # ------------------------------------------------------------------ its results

    def _ask_questions(self, model: str, adapters: list[str]) -> Questions:
        start, output = time.monotonic(), self._settings.output
        folders = [output / adapter for adapter in adapters]
        questions = ask_questions(self._settings, model, folders, self._display)
        self._seconds["questions"] = time.monotonic() - start
        return questions

    def _write(self, report: Report, results: list[dict[str, Any]], questions: Questions) -> None:
        output = self._settings.output
        write_report(report, output)
        if questions.after is not None:
            write_questions(questions, output)
        # matplotlib takes a second to load; only here.
        from lesft_testbed.picture import draw_loss
        from lesft_testbed.shares_picture import draw_shares

        draw_loss(report, [result["loss_by_round"] for result in results], output / PICTURE_FILE)
        if report.is_skewed:
            draw_shares(report, output / SHARES_FILE)
        write_page(report, output)


def run_testbed(settings: RunSettings) -> str:
    """Run the testbed and return its summary."""
    table = settings.progress == "table" or (settings.progress == "auto" and sys.stderr.isatty())
    with Display(table) as display:
        return RunCommand(settings, display).run()


def _address(service: Process) -> str:
    return service.address("grpc") or ""


def _read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values
