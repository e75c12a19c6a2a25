"""What all services are doing, read from their control APIs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

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
        self._http = httpx.Client(timeout=_TIMEOUT_SECONDS, trust_env=False)
        self._last: dict[str, ServiceView] = {}

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, process: Process, path: str) -> Any:
        """An answer as JSON, or None when the service does not answer."""
        address = process.address("control")
        if address is None or process.exit_status is not None:
            return None
        try:
            response = self._http.get(f"http://{address}{path}").raise_for_status()
        except httpx.HTTPError:
            return None
        return response.json()

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
