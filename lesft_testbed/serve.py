"""`lesft-testbed serve`: a run's result as an endpoint, by its own server and a client of it."""

import json
import sys
import time
from pathlib import Path

from lesft.commands import say
from lesft.control import ENDPOINTS_FILE
from lesft.errors import NotFound
from lesft_testbed.commands import client_name, serve_command, server_command
from lesft_testbed.processes import Process, Processes
from lesft_testbed.settings import RunSettings, ServeSettings

COMMANDS_FILE = "serve.json"
"""In the output of a run: the commands that serve its result."""

_POLL_SECONDS = 0.2
_ADDRESS = "SERVER"
"""Stands for the server's address, which is another one each time."""


def write_commands(processes: Processes, settings: RunSettings, model: str) -> None:
    """Leave the commands that serve the run's result beside it."""
    settings = settings.model_copy(update={"cache": settings.cache.absolute()})
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

    Raises NotFound where no run has finished, RunStopped when server or client fails.
    """
    file = settings.output / COMMANDS_FILE
    if not file.is_file():
        raise NotFound(
            f"{settings.output} holds no finished run: lesft-testbed run --output {settings.output}"
        )
    commands = json.loads(file.read_text())
    with Processes(settings.output) as processes:
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
