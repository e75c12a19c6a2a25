"""The mean of adapters in files, by one implementation: a program, JSON in and JSON out.

In a process of its own, so that memory is this implementation's alone. It needs numpy and
safetensors only, and the implementation, so that a Python which has Flower and not this project can
run it. Reads /proc, so Linux only.
"""

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Parts = Sequence[tuple[Path, int]]
"""Each adapter's file and its weight."""
Arrays = dict[str, npt.NDArray[np.float32]]

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_NOW, _PEAK = "VmRSS:", "VmHWM:"


class Ours:
    """The aggregator's own mean: one file is open at a time."""

    version = ""

    def __init__(self) -> None:
        # By name: the testbed imports no service but in processes of their own.
        self._mean = importlib.import_module("lesft_aggregator.mean").weighted_mean

    def read(self, parts: Parts) -> tuple[Any, float]:
        """Nothing yet: files are read as they are added up."""
        return parts, 0.0

    def mean(self, replies: Any) -> Arrays:
        """The weighted mean."""
        arrays: Arrays = self._mean(replies)
        return arrays


class Flower:
    """Flower's FedAvg, whose server calls this function with the replies of all clients."""

    def __init__(self) -> None:
        self.version: str = importlib.metadata.version("flwr")
        self._common = importlib.import_module("flwr.common")
        utils = importlib.import_module("flwr.serverapp.strategy.strategy_utils")
        self._aggregate = utils.aggregate_arrayrecords

    def read(self, parts: Parts) -> tuple[Any, float]:
        """The replies, as they lie in the server's memory, and the seconds that reading took.

        Not those of giving the arrays Flower's form, in which its server receives them.
        """
        common = self._common
        replies, seconds = [], 0.0
        for path, weight in parts:
            start = time.monotonic()
            adapter = load_file(path)
            seconds += time.monotonic() - start
            arrays = {name: common.Array(array) for name, array in adapter.items()}
            metrics = {"num-examples": weight}
            records = {
                "arrays": common.ArrayRecord(arrays),
                "metrics": common.MetricRecord(metrics),
            }
            replies.append(common.RecordDict(records))
        return replies, seconds

    def mean(self, replies: Any) -> Arrays:
        """The weighted mean."""
        average = self._aggregate(replies, "num-examples")
        return {name: array.numpy() for name, array in average.items()}


IMPLEMENTATIONS: dict[str, Callable[[], Ours | Flower]] = {"lesft": Ours, "flower": Flower}


def measured_mean(request: dict[str, Any]) -> dict[str, Any]:
    """The mean goes to the file `mean` of the request; the answer has how it came about.

    `seconds` of reading and averaging, of which `call_seconds` in the function that averages;
    `peak_mib` is the largest resident set over the one before the first file.
    """
    implementation = IMPLEMENTATIONS[request["implementation"]]()
    parts = [(Path(file), weight) for file, weight in request["parts"]]
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _resident_mib(_NOW)
    replies, read_seconds = implementation.read(parts)
    start = time.monotonic()
    mean = implementation.mean(replies)
    call_seconds = time.monotonic() - start
    peak = _resident_mib(_PEAK)
    save_file({name: np.asarray(x, np.float32) for name, x in mean.items()}, request["mean"])
    return {
        "values": {
            "seconds": read_seconds + call_seconds,
            "call_seconds": call_seconds,
            "peak_mib": peak - before,
        },
        "version": implementation.version,
    }


def _resident_mib(field: str) -> float:
    """This process's memory as Linux keeps it: now, or the most since the last reset."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    asked, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(measured_mean(json.loads(asked.read_bytes()))))
