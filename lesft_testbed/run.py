"""`lesft-testbed run`: server, aggregator and clients as processes, from start to report."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesft.errors import InternalError
from lesft_testbed.commands import (
    aggregator_command,
    client_command,
    client_name,
    evaluate_command,
    server_command,
)
from lesft_testbed.default_model import default_model
from lesft_testbed.display import Display
from lesft_testbed.output import prepare_output
from lesft_testbed.processes import Process, Processes
from lesft_testbed.report import (
    ADAPTER_FOLDER,
    PAGE_FILE,
    PICTURE_FILE,
    REPORT_FILE,
    Accuracy,
    make_report,
    summary,
    write_report,
)
from lesft_testbed.serve import COMMANDS_FILE, write_commands
from lesft_testbed.settings import RunSettings
from lesft_testbed.watch import Watcher

_STATE_FOLDER = "state"
_OURS = (REPORT_FILE, PAGE_FILE, PICTURE_FILE, ADAPTER_FOLDER, COMMANDS_FILE, _STATE_FOLDER)
_POLL_SECONDS = 0.5


class RunCommand:
    """One run of the testbed, stage by stage."""

    def __init__(self, settings: RunSettings, display: Display) -> None:
        self._settings = settings
        self._display = display
        self._clients = [client_name(index) for index in range(settings.clients)]
        self._rounds: list[dict[str, Any]] = []

    def run(self) -> str:
        """Train, write the results and return what to print.

        Raises RunStopped, naming the service and the end of its log, when one fails.
        """
        settings, start = self._settings, time.monotonic()
        prepare_output(settings.output, _OURS, (".log",))
        model = settings.model or str(default_model(settings.cache, self._display.say))
        with Processes(settings.output) as processes:
            watcher = Watcher(processes)
            try:
                self._start(processes, watcher, model)
                started = time.monotonic()
                self._train(processes, watcher)
                accuracy = self._measure_accuracy(processes, watcher, model)
            finally:
                watcher.close()
        peaks = {name: process.peak_rss_bytes for name, process in processes.all.items()}
        write_commands(processes, settings, model)
        return self._write_results(processes, start, started, accuracy, peaks)

    # ------------------------------------------------------------------ the run

    def _start(self, processes: Processes, watcher: Watcher, model: str) -> None:
        """Server and aggregator first: the clients need their addresses."""
        settings = self._settings
        server = processes.start(
            "server", server_command(settings, model, processes.state_of("server"))
        )
        aggregator = processes.start(
            "aggregator", aggregator_command(settings, processes.state_of("aggregator"))
        )
        while not (_address(server) and _address(aggregator)):
            self._look(processes, watcher)
        for index, name in enumerate(self._clients):
            command = client_command(
                settings,
                model,
                processes.state_of(name),
                index,
                _address(server),
                _address(aggregator),
            )
            processes.start(name, command)

    def _train(self, processes: Processes, watcher: Watcher) -> None:
        """Watch until all clients have ended well."""
        clients = [processes.all[name] for name in self._clients]
        while any(client.exit_status is None for client in clients):
            self._look(processes, watcher)
        processes.check(may_end=self._clients)
        self._note_rounds(watcher)
        self._display.services(watcher.look())

    def _measure_accuracy(
        self, processes: Processes, watcher: Watcher, model: str
    ) -> dict[str, Accuracy]:
        """The first client answers test questions, with the model as it was and as it is now.

        Nothing of the run is lost when that fails: its log says why, and the figures are left out.
        """
        settings, server = self._settings, _address(processes.all["server"])
        figures: dict[str, Accuracy] = {}
        with Processes(settings.output) as answering:
            for when in ("before", "after") if settings.questions else ():
                name = f"accuracy-{when}"
                output, state = processes.state_of(name), processes.state_of(self._clients[0])
                command = evaluate_command(settings, model, state, server, output, when == "before")
                self._display.say(
                    f"answering {settings.questions} test questions as the model was {when}"
                )
                process = answering.start(name, command)
                while process.exit_status is None:
                    self._look(processes, watcher)
                if process.exit_status != 0:
                    last = process.log_tail(1)
                    self._display.say(f"no accuracy: {last} ({process.log} has the details)")
                    return {}
                figures[when] = Accuracy.model_validate(_read_json(output / "evaluation.json"))
        return figures

    def _look(self, processes: Processes, watcher: Watcher) -> None:
        processes.check(may_end=self._clients)
        self._note_rounds(watcher)
        self._display.services(watcher.look())
        time.sleep(_POLL_SECONDS)

    def _note_rounds(self, watcher: Watcher) -> None:
        new = watcher.rounds(first=len(self._rounds))
        self._rounds += new
        self._display.rounds_done(new, self._settings.num_rounds)

    # ------------------------------------------------------------------ its results

    def _write_results(
        self,
        processes: Processes,
        start: float,
        started: float,
        accuracy: Mapping[str, Accuracy],
        peaks: dict[str, int],
    ) -> str:
        settings, output = self._settings, self._settings.output
        spec = _read_json(processes.state_of("server") / "run_spec.json")
        results = [_read_json(processes.state_of(name) / "result.json") for name in self._clients]
        _join_adapter(processes, self._clients, results, output / ADAPTER_FOLDER)
        seconds = {"starting": started - start, "total": time.monotonic() - start}
        report = make_report(
            spec,
            settings.data,
            settings.samples,
            self._rounds,
            results,
            accuracy,
            seconds,
            peaks,
        )
        write_report(report, output)
        # matplotlib takes a second to load; only here.
        from lesft_testbed.picture import draw_loss

        draw_loss(report, [result["loss_by_round"] for result in results], output / PICTURE_FILE)
        return summary(report, output)


def run_testbed(settings: RunSettings) -> str:
    """Run the testbed and return its summary."""
    table = settings.progress == "table" or (settings.progress == "auto" and sys.stderr.isatty())
    with Display(table) as display:
        return RunCommand(settings, display).run()


def _address(service: Process) -> str:
    return service.address("grpc") or ""


def _join_adapter(
    processes: Processes, clients: list[str], results: list[dict[str, Any]], folder: Path
) -> None:
    """Front and back as one PEFT adapter, once it is certain that all clients hold the same."""
    digests = {result["adapter_sha256"] for result in results}
    if len(digests) != 1:
        raise InternalError(
            f"the clients' adapters differ after the last aggregation: {', '.join(sorted(digests))}"
        )
    # torch takes seconds to load; only here.
    from lesft.adapter_export import export_adapter
    from lesft.adapter_halves import SPEC_FILE, load_half
    from lesft.model_card import figures_of
    from lesft.spec import RunSpec

    server = processes.state_of("server")
    spec = RunSpec.model_validate_json((server / SPEC_FILE).read_text())
    front, back = load_half(processes.state_of(clients[0])), load_half(server)
    export_adapter(folder, front, back, spec, figures=figures_of(results))


def _read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values
