"""The part `scale`: what the server spends on a token, with few clients and with many.

A real server of a random model, and clients that only send: prepared activations, each over a
connection of its own, by the client's own link. All of them share one process and one processor,
which real clients would not, so the figure counts processor time of the server's process alone.
Each step has one micro-batch of every client; the next step's are on their way meanwhile. All
sequences are of one length: what padding costs is the part `batching`'s business.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lesft_testbed.bench.jobs import run_program, start_service
from lesft_testbed.bench.part import Alternative, Bench, Figure, Values
from lesft_testbed.commands import server_command
from lesft_testbed.processes import Processes
from lesft_testbed.settings import RunSettings
from lesft_testbed.tiny_model import save_tiny_model

_SERVER = "server"
_MANY_STEPS = 1_000_000
"""In one round, so that the optimizer's step and the checkpoint after it are never reached."""
_CUT_LAYER, _LAYERS = 1, 5


def worst_over_best(values: Values) -> float:
    """The server's processor time for a token, where it is most over where it is least."""
    each = [one["server_cpu_us_per_token"] for one in values.values()]
    return max(each) / min(each)


class Scale:
    """The server's time for a token by the number of clients."""

    name = "scale"
    about = (
        "Microseconds that a token of a step takes, with more and more simulated clients on "
        "sockets of their own."
    )
    depends_on = ("seed", "threads")
    is_exact = False
    figures = (
        Figure(
            "scale",
            "server's processor time for a token with that number of clients where it is most / "
            "where it is least",
            worst_over_best,
            1.15,
        ),
    )

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        """Each number of clients."""
        (folder := bench.scratch / "model").mkdir()
        width = bench.settings.scale.hidden_size
        model = save_tiny_model(
            folder,
            bench.settings.seed,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=_LAYERS,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=1024,
        )
        yield [
            Alternative(
                f"{count} client{'s' * (count > 1)}", partial(_measure, bench, model, count)
            )
            for count in bench.settings.scale.clients
        ]


def _measure(bench: Bench, model: Path, clients: int) -> dict[str, float]:
    """A fresh server and so many clients. Raises RunStopped when one side fails."""
    own, run = bench.settings.scale, _run_settings(bench, clients)
    with Processes(Path(tempfile.mkdtemp(dir=bench.scratch))) as processes:
        command = server_command(run, str(model), processes.state_of(_SERVER))
        address = start_service(processes, _SERVER, command)
        server = processes.all[_SERVER]
        request = {
            "server": address,
            "server_control": server.address("control"),
            "server_pid": server.pid,
            **own.model_dump(include={"tokens", "steps", "seconds", "skipped_steps"}),
        }
        return run_program(bench, "clients", "simulated_clients", request)


def _run_settings(bench: Bench, clients: int) -> RunSettings:
    """Defaults but for these; unvalidated, so that no environment variable has a say."""
    return RunSettings.model_construct(
        run_id="scale",
        clients=clients,
        aggregate=False,
        cut_layer=_CUT_LAYER,
        accumulation=_MANY_STEPS,
        rounds=1,
        seed=bench.settings.seed,
        device="auto",
        server_threads=max(1, bench.settings.num_threads // 2),
    )
