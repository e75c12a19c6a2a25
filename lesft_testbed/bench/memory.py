"""The part `memory`: what the device needs, by the precision in which it keeps its frozen weights.

A real server and a real client of a random model of Qwen2.5-3B's shape take one training step. The
client's part is that of the whole model; of the server's, which is not measured, one layer stands
for all.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from lesft_testbed.bench.jobs import run_program, start_service
from lesft_testbed.bench.part import Alternative, Bench, Figure, Values
from lesft_testbed.commands import client_command, client_name, server_command
from lesft_testbed.processes import Process, Processes
from lesft_testbed.settings import RunSettings

_SERVER, _CLIENT = "server", client_name(0)
_PRECISIONS = ("bf16", "int8", "int4", "fp32")
_TARGETS = {"bf16": 2300, "int8": 1500}
_POLL_SECONDS = 0.05
_RESULT = "result.json"


def peak_rss(precision: str, values: Values) -> float:
    """The client's largest resident set."""
    return values[precision]["client_peak_rss_mib"]


class Memory:
    """The client's memory by precision."""

    name = "memory"
    about = (
        "Largest resident set of a client of a model of Qwen2.5-3B's shape, over its whole life; "
        "of that the largest that is no page of a file; and the seconds of its one step."
    )
    depends_on = ("seed", "threads")
    is_exact = False
    figures = tuple(
        Figure(
            f"client_peak_rss_mib_{precision}",
            f"MiB of the client, front in {precision}, one step of 512 tokens",
            partial(peak_rss, precision),
            target,
        )
        for precision, target in _TARGETS.items()
    )

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        """Each precision, on the same weights."""
        own = bench.settings.memory
        model, sample = bench.scratch / "model", bench.scratch / "sample.jsonl"
        request = {
            "folder": str(model),
            "sample": str(sample),
            "seed": bench.settings.seed,
            "tokens": own.tokens,
            "config": {"num_hidden_layers": own.cut_layer + 1},
        }
        run_program(bench, "model-files", "large_model", request)
        yield [
            Alternative(precision, partial(measure_client, bench, model, sample, precision))
            for precision in _PRECISIONS
        ]


def measure_client(bench: Bench, model: Path, sample: Path, precision: str) -> dict[str, float]:
    """One run of one step. Raises RunStopped when a service fails."""
    run = _run_settings(bench, sample)
    with Processes(Path(tempfile.mkdtemp(dir=bench.scratch))) as processes:
        # In bfloat16 the server computes with the files' own pages, and is ready at once.
        command = server_command(
            run, str(model), processes.state_of(_SERVER), {"precision": "bf16"}
        )
        address = start_service(processes, _SERVER, command)
        more = {"precision": precision, "gradient_checkpointing": True}
        state = processes.state_of(_CLIENT)
        command = client_command(run, str(model), state, 0, address, "", more)
        client = processes.start(_CLIENT, command)
        anonymous = _watch(processes, client)
        result = json.loads((state / _RESULT).read_text())
    return {
        "client_peak_rss_mib": client.peak_rss_bytes / 2**20,
        "anonymous_mib": anonymous / 2**20,
        "step_tokens": result["tokens"],
        "front_seconds": sum(result["seconds"][f"front_{way}"] for way in ("forward", "backward")),
    }


def _watch(processes: Processes, client: Process) -> int:
    """Follow the client to its end; the most that it held in bytes which are no file's pages."""
    most = 0
    while client.exit_status is None:
        processes.check(may_end=[_CLIENT])
        client.measure_memory()
        with suppress(psutil.Error):  # it may have ended by now
            memory = psutil.Process(client.pid).memory_info()
            most = max(most, memory.rss - memory.shared)
        time.sleep(_POLL_SECONDS)
    processes.check(may_end=[_CLIENT])
    return most


def _run_settings(bench: Bench, sample: Path) -> RunSettings:
    """Defaults but for these; unvalidated, so that no environment variable has a say."""
    settings = bench.settings
    return RunSettings.model_construct(
        run_id="memory",
        clients=1,
        aggregate=False,
        cut_layer=settings.memory.cut_layer,
        accumulation=1,
        rounds=1,
        data=str(sample),
        samples=1,
        held_out=0,
        seed=settings.seed,
        cache=settings.cache,
        weights="local",
        device="cpu",
        server_threads=settings.num_threads,
        client_threads=settings.num_threads,
    )
