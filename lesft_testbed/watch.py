"""What all services are doing, read from their control APIs."""

import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from lesft.identity.commands import give_access
from lesft.identity.security import open_authority
from lesft.identity.settings import Service
from lesft_testbed.processes import Process, Processes

_TIMEOUT_SECONDS = 2


@dataclass(frozen=True)
class ServiceView:
    """One service at one moment. None stands for what the kind of service has not."""

    name: str
    state: str
    memory_bytes: int
    round: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None


class Watcher:
    """Reads the control APIs over kept-open connections."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._http: dict[str, httpx.Client] = {}
        self._last: dict[str, ServiceView] = {}

    def close(self) -> None:
        """Close the connections."""
        for client in self._http.values():
            client.close()

    def get(self, process: Process, path: str) -> Any:
        """An answer as JSON, or None when the service does not answer."""
        address = process.address("control")
        if address is None or process.exit_status is not None:
            return None
        try:
            response = self._client(process, address).get(path).raise_for_status()
        except httpx.HTTPError:
            return None
        return response.json()

    def _client(self, process: Process, address: str) -> httpx.Client:
        """Of its own for each service; over TLS, with a token of ours, where that is asked for."""
        if address not in self._http:
            self._http[address] = _connect(process, address)
        return self._http[address]

    def look(self) -> Sequence[ServiceView]:
        """All services, in the order they were started; as seen last where one does not answer."""
        for name, process in self._processes.all.items():
            view = self._view(process) or self._last.get(name)
            self._last[name] = view or ServiceView(name, "starting", process.measure_memory())
        return list(self._last.values())

    def _view(self, process: Process) -> ServiceView | None:
        memory_bytes = process.measure_memory()
        if process.exit_status is not None:
            state = "finished" if process.exit_status == 0 else process.end()
            before = self._last.get(process.name, ServiceView(process.name, state, 0))
            return replace(before, state=state, memory_bytes=0)
        if process.name == "server":
            run = self.get(process, "/v1/run")
            return run and ServiceView(process.name, run["state"], memory_bytes, run["rounds_done"])
        if process.name == "aggregator":
            run = self.get(process, "/v1/run")
            return run and ServiceView(process.name, f"version {run['version']}", memory_bytes)
        status = self.get(process, "/v1/status")
        return status and ServiceView(
            process.name,
            status["phase"],
            memory_bytes,
            status["round"],
            status["loss"],
            status["tokens_per_second"],
            status["bytes_up"],
            status["bytes_down"],
        )


def _connect(process: Process, address: str) -> httpx.Client:
    name, tls = process.name, process.endpoint("tls") not in (None, "off")
    if not tls or name not in ("server", "aggregator"):
        return httpx.Client(base_url=f"http://{address}", timeout=_TIMEOUT_SECONDS, trust_env=False)
    service: Service = "server" if name == "server" else "aggregator"
    token = give_access(process.state, service, f"testbed-{os.getpid()}-{time.time_ns()}", "viewer")
    authority = open_authority(process.state, service).certificate_pem.decode()
    return httpx.Client(
        base_url=f"https://{address}",
        headers={"Authorization": f"Bearer {token.text()}"},
        verify=ssl.create_default_context(cadata=authority),
        timeout=_TIMEOUT_SECONDS,
        trust_env=False,
    )
