"""The part `aggregate`: the mean of many adapters, by the aggregator and by Flower's FedAvg.

Both get the same files and weights, each in a fresh process, and both means are compared. Flower's
aggregation is a function of the replies of all clients, which its server holds in memory; so they
are read first. Reading counts for both; giving arrays Flower's form does not, since its server
receives them in it. Networks and databases have no part in it.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lesft.errors import InternalError, InvalidInput
from lesft_testbed.bench.jobs import run_program
from lesft_testbed.bench.part import Alternative, Bench, Figure, ratio

OURS, FLOWER = "lesft", "flower"
_WIDTH, _INNER_WIDTH, _RANK = 2048, 11008, 8
"""Qwen2.5-3B's hidden and MLP width; nine layers of adapters on the MLP's three matrices: 11 MB."""
_TOLERANCE = 1e-5


class Aggregate:
    """Memory and time of one average."""

    name = "aggregate"
    about = "Memory and seconds of averaging all submissions, by the aggregator and by Flower."
    depends_on = ("seed",)
    is_exact = False
    figures = (
        Figure(
            "aggregate_memory",
            "peak memory of the aggregator's mean over the process's before / of Flower's FedAvg",
            ratio(OURS, FLOWER, "peak_mib"),
            0.1,
        ),
        Figure(
            "aggregate_seconds",
            "seconds of the aggregator's mean / of Flower's FedAvg, reading included",
            ratio(OURS, FLOWER, "seconds"),
            1.0,
        ),
    )

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        """The aggregator and Flower. Raises InvalidInput where Flower cannot be had."""
        own = bench.settings.aggregate
        pythons = {OURS: sys.executable, FLOWER: own.flower_python or sys.executable}
        check_python(pythons[FLOWER])
        parts = write_submissions(
            bench.scratch, own.submissions, own.layers, seed=bench.settings.seed
        )

        def measure(implementation: str) -> dict[str, float]:
            request = {
                "implementation": implementation,
                "parts": [(str(file), weight) for file, weight in parts],
                "mean": str(bench.scratch / f"{implementation}.safetensors"),
            }
            answer = run_program(
                bench, f"mean-{implementation}", "averaging", request, pythons[implementation]
            )
            if answer["version"]:
                bench.versions["flwr"] = answer["version"]
            check_same_mean(bench.scratch)
            values: dict[str, float] = answer["values"]
            return values

        yield (
            Alternative(OURS, lambda: measure(OURS)),
            Alternative(FLOWER, lambda: measure(FLOWER)),
        )


def check_python(python: str) -> None:
    """Raises InvalidInput for a Python that cannot run Flower's side of the comparison."""
    if not Path("/proc/self/clear_refs").exists():
        raise InvalidInput("part aggregate measures memory as Linux keeps it: leave it out here")
    words = [python, "-c", "import flwr.serverapp, safetensors"]
    try:
        done = subprocess.run(words, capture_output=True, check=False)
    except OSError as error:
        raise InvalidInput(f"--aggregate.flower-python {python}: {error.strerror}") from None
    if done.returncode != 0:
        raise InvalidInput(
            f"part aggregate compares with Flower, which {python} does not have: python -m venv "
            "flower && flower/bin/pip install flwr safetensors, then --aggregate.flower-python "
            "flower/bin/python; or leave the part out (--parts)"
        )


def write_submissions(
    folder: Path, count: int, layers: int, seed: int, width: int = _WIDTH, inner: int = _INNER_WIDTH
) -> list[tuple[Path, int]]:
    """Random adapters as clients would hand them in, each with a number of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    parts = []
    for index in range(count):
        adapter = {
            f"model.layers.{layer}.mlp.{module}.lora_{matrix}.weight": random.standard_normal(
                shape, dtype=np.float32
            )
            for layer in range(layers)
            for module, wide, narrow in (
                ("gate_proj", inner, width),
                ("up_proj", inner, width),
                ("down_proj", width, inner),
            )
            for matrix, shape in (("A", (_RANK, narrow)), ("B", (wide, _RANK)))
        }
        path = folder / f"submission-{index}.safetensors"
        save_file(adapter, path)
        parts.append((path, 10 + index))
    return parts


def check_same_mean(folder: Path) -> None:
    """Both must have done the same work. Raises InternalError where the means differ."""
    files = [folder / f"{name}.safetensors" for name in (OURS, FLOWER)]
    if not all(file.is_file() for file in files):
        return
    ours, theirs = map(load_file, files)
    for name in ours.keys() | theirs.keys():
        if name not in ours or name not in theirs:
            raise InternalError(f"only one of the two means has {name}")
        if not np.allclose(ours[name], theirs[name], atol=_TOLERANCE):
            raise InternalError(f"the two means differ in {name}")
