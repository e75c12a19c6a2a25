"""How many runs this machine has room for at once, and how long the rest will take."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from lesft_testbed.comparison.plan import PlannedRun
from lesft_testbed.methods import METHODS

_PROCESS_BYTES = 500 << 20
"""Python with torch, before any weights."""
_LOADED_PER_STORED = 2
"""Weights are stored in two bytes each, mostly, and are loaded in four."""
_SHARE_OF_FREE_MEMORY = 0.8


def runs_at_once(runs: Sequence[PlannedRun], device: str) -> int:
    """Runs that fit on this machine at once, one at least: by cores and free memory.

    One on a GPU, and where the weights' size is not known because they are on the hub. A run whose
    server takes all cores (`server_threads` 0) leaves none for another.
    """
    on_gpu = device not in ("auto", "cpu") or (device == "auto" and Path("/dev/nvidiactl").exists())
    sizes = {run.model: weights_bytes(run.model) for run in runs}
    if on_gpu or not all(sizes.values()):
        return 1
    free = psutil.virtual_memory().available * _SHARE_OF_FREE_MEMORY
    by_memory = min(free // _memory_bytes(run, sizes[run.model]) for run in runs)
    by_cores = min((os.cpu_count() or 1) // _cores(run) for run in runs)
    return max(1, int(min(by_memory, by_cores)))


def weights_bytes(model: str) -> int:
    """Bytes of a model folder's safetensors files; 0 where there is no such folder."""
    return sum(file.stat().st_size for file in Path(model).expanduser().glob("*.safetensors"))


def num_layers(model: str) -> int | None:
    """Decoder layers by a model folder's config; None where there is no such folder or entry."""
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    layers = config.get("num_hidden_layers") or config.get("text_config", {}).get(
        "num_hidden_layers"
    )
    return int(layers) if layers else None


def _memory_bytes(run: PlannedRun, stored: int) -> int:
    """A run's memory at its most, roughly: a front is counted as half of the model."""
    weights = stored * _LOADED_PER_STORED
    whole = weights + _PROCESS_BYTES
    if run.kind == "untuned" or METHODS[run.method].pooled:
        return whole
    clients = int(run.options["clients"])
    if not METHODS[run.method].split:
        return clients * whole
    return whole + clients * (weights // 2 + _PROCESS_BYTES)


def _cores(run: PlannedRun) -> int:
    """Clients and server mostly take turns."""
    cores = os.cpu_count() or 1
    if run.kind == "untuned":
        return int(run.options["threads"]) or cores
    server = int(run.options["server_threads"]) or cores
    clients = int(run.options["clients"]) * (int(run.options["client_threads"]) or cores)
    return max(1, min(cores, max(server, clients)))


class TimeLeft:
    """Guesses how long the rest takes, in proportion to samples and questions."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._seconds: dict[str, float] = {}
        self._work: dict[str, float] = {}

    def note(self, run: PlannedRun, seconds: float) -> None:
        """Note that a run took so long."""
        self._seconds[run.method] = self._seconds.get(run.method, 0.0) + seconds
        self._work[run.method] = self._work.get(run.method, 0.0) + work(run)

    def seconds(self, runs: Sequence[PlannedRun]) -> float | None:
        """Seconds that these will take; None while nothing is done."""
        if not self._seconds:
            return None
        overall = sum(self._seconds.values()) / sum(self._work.values())
        total = sum(work(run) * self._rates().get(run.method, overall) for run in runs)
        return total / min(self._at_once, max(1, len(runs)))

    def _rates(self) -> Mapping[str, float]:
        return {name: self._seconds[name] / self._work[name] for name in self._seconds}


def work(run: PlannedRun) -> float:
    """How much there is to do in a run: samples to train on and questions, one like the other."""
    options = run.options
    trained = (
        options["clients"] * options["samples"] * options["epochs"] if run.kind == "training" else 0
    )
    return float(trained + options["questions"])
