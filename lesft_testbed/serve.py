"""`lesft-testbed serve`: a run's result as an endpoint, by its own server and a client of it."""

import json
import sys
import time
from pathlib import Path

from lesft.commands import say
from lesft.control import ENDPOINTS_FILE
from lesft.errors import NotFound
from lesft_testbed.commands import client_name, serve_command, server_command
from lesft_testbed.output import OUTPUT_USERS, locked_output
from lesft_testbed.processes import Process, Processes
from lesft_testbed.report import REPORT_FILE
from lesft_testbed.settings import RunSettings, ServeSettings

COMMANDS_FILE = "serve.json"
"""In the output of a run: the commands that serve its result."""

_POLL_SECONDS = 0.2
_ADDRESS = "SERVER"
"""Stands for the server's address, which is another one each time."""


def write_commands(processes: Processes, settings: RunSettings, model: str) -> None:
    """Leave the commands that serve the run's result beside it."""
    # On this machine, and on another port each time: nobody would be enrolled with that.
    settings = settings.model_copy(update={"cache": settings.cache.absolute(), "tls": False})
    if Path(model).exists():
        model = str(Path(model).absolute())
    commands = {
        "server": server_command(settings, model, processes.state_of("server").absolute()),
        "client": serve_command(
            settings, model, processes.state_of(client_name(0)).absolute(), _ADDRESS
        ),
    }
    (settings.output / COMMANDS_FILE).write_text(json.dumps(commands, indent=2))


def serve(settings: ServeSettings) -> None:
    """Serve until the user stops it.

    Raises NotFound where no run with a server has finished, RunStopped when server or client fails.
    """
    commands = _read_commands(settings.output)
    with locked_output(settings.output, OUTPUT_USERS), Processes(settings.output) as processes:
        (processes.state_of("server") / ENDPOINTS_FILE).unlink(missing_ok=True)
        server = processes.start("server", commands["server"], append=True)
        say("starting the server")
        while not (address := server.address("grpc")):
            _wait(processes)
        say(f"its address, for lesft-client generate, chat and evaluate: {address}")
        placeholder = f"--server={_ADDRESS}"
        command = [
            f"--server={address}" if word == placeholder else word for word in commands["client"]
        ]
        client = processes.start("endpoint", [*command, f"--listen={settings.listen}"])
        _show(processes, client)


def local_command(output: Path, adapter: str, model: str) -> str:
    """What serves the adapter of a run without a server."""
    return f"lesft-client serve --local --model {model} --adapter {output / adapter}"


def _read_commands(output: Path) -> dict[str, list[str]]:
    file, report_file = output / COMMANDS_FILE, output / REPORT_FILE
    if file.is_file():
        commands: dict[str, list[str]] = json.loads(file.read_text())
        return commands
    if not report_file.is_file():
        raise NotFound(f"{output} holds no finished run: lesft-testbed run --output {output}")
    report = json.loads(report_file.read_text())
    model = report["settings"]["model"] or "$(lesft-testbed model | tail -1)"
    raise NotFound(
        f"the run in {output} had no server, since its method, {report['method']}, does not split "
        f"the model: {local_command(output, report['adapters'][0], model)}"
    )


def _show(processes: Processes, client: Process) -> None:
    """What the client prints, as it comes."""
    with Path(client.log).open() as log:
        log.readline()  # its command
        while True:
            if text := log.read():
                sys.stderr.write(text)
                sys.stderr.flush()
            _wait(processes)


def _wait(processes: Processes) -> None:
    processes.check()
    time.sleep(_POLL_SECONDS)
