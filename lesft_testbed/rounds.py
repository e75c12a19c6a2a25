"""The finished rounds of a run: as its server keeps them or, without one, from the clients."""

import json
import time
from collections.abc import Sequence
from typing import Any

from lesft.errors import RunStopped
from lesft_testbed.processes import Processes
from lesft_testbed.watch import Watcher

RESULT_FILE = "result.json"
"""In a client's state folder, once it has finished."""

_LAST_TRIES, _LAST_PAUSE_SECONDS = 60, 0.5

_BY_ROUND = ("loss_by_round", "nll_by_round", "class_counts_by_round")


class RoundLog:
    """Collects rounds as they end; `records` has those so far.

    A record is what the server's /v1/rounds says: round, loss, nll, class_counts, seconds.
    """

    def __init__(
        self, processes: Processes, watcher: Watcher, clients: Sequence[str], split: bool
    ) -> None:
        """`clients` by the names of their processes; `split` for a run that has a server."""
        self._processes = processes
        self._watcher = watcher
        self._clients = clients
        self._split = split
        self._last_end = time.monotonic()
        self.records: list[dict[str, Any]] = []

    def new(self) -> list[dict[str, Any]]:
        """Rounds that have ended since the last call."""
        first = len(self.records)
        new = self._from_server(first) if self._split else self._from_clients(first)
        self.records += new
        return new

    def rest(self, count: int) -> list[dict[str, Any]]:
        """Rounds that have ended since the last call, of a run of `count` rounds that is over.

        A busy service may not answer in time, so it is asked again. Raises RunStopped when rounds
        are missing after half a minute.
        """
        new = self.new()
        for _ in range(_LAST_TRIES):
            if len(self.records) >= count:
                return new
            time.sleep(_LAST_PAUSE_SECONDS)
            new += self.new()
        raise RunStopped(
            f"all clients have finished {count} rounds, but figures of {len(self.records)} only "
            f"could be had from {'the server' if self._split else 'them'}: run it again, on a "
            "machine that is less busy"
        )

    def _from_server(self, first: int) -> list[dict[str, Any]]:
        server = self._processes.all["server"]
        return self._watcher.get(server, f"/v1/rounds?first={first}") or []

    def _from_clients(self, first: int) -> list[dict[str, Any]]:
        bodies = [self._body(name) for name in self._clients]
        known = [body for body in bodies if body is not None]
        now = time.monotonic()
        if len(known) < len(bodies):
            return []
        done = min(len(body[name]) for body in known for name in _BY_ROUND)
        if done == 0 and any(body.get("phase") != "training" for body in known):
            self._last_end = now  # the first round has not begun
        if done <= first:
            return []
        seconds = (now - self._last_end) / (done - first)
        self._last_end = now
        return [merged_round(known, index, seconds) for index in range(first, done)]

    def _body(self, name: str) -> dict[str, Any] | None:
        """A client's status, or its result when it has finished; None when neither is there."""
        client = self._processes.all.get(name)
        if client is None:
            return None
        body: dict[str, Any] | None
        if client.exit_status is None:
            body = self._watcher.get(client, "/v1/status")
        else:
            result = client.state / RESULT_FILE
            body = json.loads(result.read_text()) if result.is_file() else None
        return body


def merged_round(bodies: Sequence[dict[str, Any]], index: int, seconds: float) -> dict[str, Any]:
    """One round of all clients that took part: means by their share of the data, sums of counts."""
    counts = [body["class_counts_by_round"][index] for body in bodies]
    counts = [each for each in counts if each is not None]
    return {
        "round": index,
        "loss": _mean(bodies, "loss_by_round", index),
        "nll": _mean(bodies, "nll_by_round", index),
        "class_counts": [sum(column) for column in zip(*counts, strict=True)] or None,
        "seconds": seconds,
    }


def _mean(bodies: Sequence[dict[str, Any]], name: str, index: int) -> float:
    parts = [
        (body["num_samples"], body[name][index]) for body in bodies if body[name][index] is not None
    ]
    total = sum(samples for samples, _ in parts)
    return sum(samples * value for samples, value in parts) / total if total else float("nan")
