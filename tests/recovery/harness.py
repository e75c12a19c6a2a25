"""Whole runs of real processes that are quick to start, and what is compared after them."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from safetensors.numpy import load_file

from lesft_testbed.chaos_run import PORTS, free_addresses
from tests.processes.harness import make_samples, write_samples

SECONDS = 60
"""How long a test waits for what is sure to come."""

CLIENTS = ("a", "b")

MAX_WORKERS = 16
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % MAX_WORKERS
"""Tests that run at the same time must not give the same port to two services."""

MODULES = {
    "server": "lesft_server.main",
    "aggregator": "lesft_aggregator.main",
    "client": "lesft_client.main",
}

Disturbance = tuple[str, str, int | str]
"""See `tests.recovery.zygote.disturb`; such as `("module:Class.name", "before", 7)`."""


class Zygote:
    """See `tests.recovery.zygote`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.recovery.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        assert self._read() == {"ready": True}

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        disturbance: Disturbance | None = None,
    ) -> int:
        """Run a command; returns its pid."""
        request = {"module": module, "arguments": arguments, "log": str(log)}
        return int(self._ask({**request, "disturbance": disturbance})["pid"])

    def status(self, pid: int) -> int | None:
        """The exit status; negative for a signal, None while it runs. Not to be asked again."""
        status: int | None = self._ask({"poll": pid})["status"]
        return status

    def close(self) -> None:
        """End it; its children are ended by whoever started them."""
        self._stdin.close()
        self._process.wait(SECONDS)
        self._stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._stdin.write(json.dumps(request) + "\n")
        self._stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._stdout.readline())
        return answer


@dataclass(frozen=True)
class Outcome:
    """All that must be the same however often a run was disturbed."""

    adapters: dict[str, str]
    losses: dict[str, list[float]]
    held_out: dict[str, Any]
    versions: list[str]
    steps: int
    lineage: str


class Run:
    """A server, an aggregator and two clients, each in a folder of its name."""

    def __init__(self, zygote: Zygote, folder: Path, model: Path, **options: Any) -> None:
        """`options` are the server's."""
        self._zygote = zygote
        self.folder = folder
        self._addresses = dict(
            zip(
                ("server", "server control", "aggregator", "aggregator control"),
                free_addresses(4, PORTS[_WORKER::MAX_WORKERS]),
                strict=True,
            )
        )
        self._data = write_samples(folder / "data.jsonl", make_samples(20))
        self._model = model
        self._options = options
        self._pids: dict[str, int] = {}
        self._statuses: dict[str, int] = {}

    def start(self, name: str, disturbance: Disturbance | None = None, *more: str) -> None:
        """Start a service, again if need be; a client by its name."""
        kind = name if name in MODULES else "client"
        words = ["train"] if kind == "client" else []
        values = getattr(self, f"_{kind}_options")(name)
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
        self._statuses.pop(name, None)
        self._pids[name] = self._zygote.start(
            MODULES[kind], [*words, *arguments, *more], self.log(name), disturbance
        )

    def start_all(self, **disturbance: Disturbance) -> None:
        """Start everything; the clients try until the services are there."""
        for name in ("server", "aggregator", *CLIENTS):
            self.start(name, disturbance.get(name))

    def log(self, name: str) -> Path:
        """What a service has printed in all its lives."""
        return self.folder / f"{name}.log"

    def status(self, name: str) -> int | None:
        """The exit status of a service's last life; None while it runs."""
        if name not in self._statuses:
            status = self._zygote.status(self._pids[name])
            if status is None:
                return None
            self._statuses[name] = status
        return self._statuses[name]

    def wait(self, name: str, seconds: float = SECONDS) -> int:
        """Wait for a service's end."""
        end = time.monotonic() + seconds
        while (status := self.status(name)) is None:
            assert time.monotonic() < end, f"{name} does not end:\n{self.logs()}"
            time.sleep(0.01)
        return status

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End a service."""
        os.kill(self._pids[name], number)
        self.wait(name)

    def end(self) -> None:
        """No process is left after this."""
        for name in self._pids:
            if self.status(name) is None:
                with suppress(ProcessLookupError):
                    self.kill(name)

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(
            f"--- {path.stem}\n" + "\n".join(path.read_text().splitlines()[-12:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def ask(self, service: str, path: str) -> Any:
        """An answer of a control API, as soon as there is one."""
        end = time.monotonic() + SECONDS
        while True:
            try:
                url = f"http://{self._addresses[f'{service} control']}{path}"
                return httpx.get(url, trust_env=False).raise_for_status().json()
            except httpx.HTTPError:
                assert time.monotonic() < end, f"{service} does not answer:\n{self.logs()}"
                time.sleep(0.05)

    def wait_until(self, service: str, condition: Callable[[Any], bool]) -> None:
        """Wait until GET /v1/run answers what a test waits for."""
        end = time.monotonic() + SECONDS
        while not condition(body := self.ask(service, "/v1/run")):
            assert time.monotonic() < end, f"{body}\n{self.logs()}"
            time.sleep(0.02)

    def wait_for_log(self, name: str, text: str) -> None:
        """Wait until a service has printed a text."""
        end = time.monotonic() + SECONDS
        while not self.log(name).exists() or text not in self.log(name).read_text():
            assert time.monotonic() < end, f"no {text!r} from {name}:\n{self.logs()}"
            time.sleep(0.02)

    def log_of_second(self, name: str) -> str:
        """The last line of a second process of a service, which must fail while the first runs."""
        first = self._pids[name]
        self.start(name)
        assert self.wait(name) == 1, self.logs()
        self._pids[name] = first
        del self._statuses[name]
        return self.log(name).read_text().splitlines()[-1]

    def finish(self) -> Outcome:
        """Wait until all clients have ended well."""
        for name in CLIENTS:
            assert self.wait(name) == 0, self.logs()
        logs = "".join(path.read_text() for path in self.folder.glob("*.log"))
        assert "Traceback" not in logs, self.logs()
        results = {
            name: json.loads((self.folder / name / "result.json").read_text()) for name in CLIENTS
        }
        run = self.ask("server", "/v1/run")
        newest = self.ask("aggregator", "/v1/run")["version"]
        return Outcome(
            adapters={
                name: _tensors_digest(self.folder / name / "adapter.safetensors")
                for name in ("server", *CLIENTS)
            },
            losses={name: result["loss_by_round"] for name, result in results.items()},
            held_out={
                name: (result["held_out_before"], result["held_out_after"])
                for name, result in results.items()
            },
            versions=[
                self.ask("aggregator", f"/v1/adapters/{version}")["sha256"]
                for version in range(1, newest + 1)
            ],
            steps=run["steps_applied"],
            lineage=run["lineage"],
        )

    # ------------------------------------------------------------------ options

    def _server_options(self, name: str) -> dict[str, Any]:
        return {
            "model": self._model,
            "state": self.folder / name,
            "listen": self._addresses["server"],
            "control": self._addresses["server control"],
            "clients": len(CLIENTS),
            "rounds": 6,
            "aggregation_interval": 2,
            "accumulation": 2,
            "cut_layer": 1,
            "max_length": 64,
            "optimizer.learning_rate": 5e-3,
            "heartbeat_seconds": 0.2,
            "stall_seconds": 2,
            **self._options,
        }

    def _aggregator_options(self, name: str) -> dict[str, Any]:
        deadline = {
            key: self._options[key] for key in ("quorum", "deadline_seconds") & self._options.keys()
        }
        return {
            **deadline,
            "state": self.folder / name,
            "listen": self._addresses["aggregator"],
            "control": self._addresses["aggregator control"],
            "clients": len(CLIENTS),
            "heartbeat_seconds": 0.2,
        }

    def _client_options(self, name: str) -> dict[str, Any]:
        return {
            "client_id": name,
            "state": self.folder / name,
            "server": self._addresses["server"],
            "aggregator": self._addresses["aggregator"],
            "control": "127.0.0.1:0",
            "model": self._model,
            "data": self._data,
            "share": f"{CLIENTS.index(name) + 1}/{len(CLIENTS)}",
            "held_out": 1,
            "cache": self.folder / "cache",
            "stall_seconds": 2,
        }


@contextmanager
def new_run(zygote: Zygote, folder: Path, model: Path, **options: Any) -> Iterator[Run]:
    """A run whose processes are all gone after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(zygote, folder, model, **options)
    try:
        yield run
    finally:
        run.end()


def _tensors_digest(file: Path) -> str:
    """Over the tensors alone: the file also names the run's settings."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()
