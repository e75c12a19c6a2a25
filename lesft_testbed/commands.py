"""The command lines of the three services, from the testbed's settings; all ports are free ones.

Settings are as those who train see them, `RunSettings.as_trained`. `more` are options beside these
or, like a fixed port, instead of them.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lesft.spec import RunOptions
from lesft_testbed.settings import RunSettings

_ANY_PORT = "127.0.0.1:0"
_ANSWERS_AT_ONCE = 32
_NO_MORE: Mapping[str, Any] = {}


def client_name(index: int) -> str:
    """The id of the client with this index, from 0."""
    return f"client-{index}"


def server_command(
    settings: RunSettings, model: str, state: Path, more: Mapping[str, Any] = _NO_MORE
) -> list[str]:
    """`lesft-server` with the run's options."""
    own = {
        "model": model,
        "state": state,
        "listen": _ANY_PORT,
        "control": _ANY_PORT,
        "cut_layer": settings.cut_layer,
        "device": settings.device,
        "precision": settings.precision,
        "threads": settings.server_threads,
    }
    if settings.tls:
        own["tls"] = "on"
    return [program("lesft-server"), *options({**own, **_run_options(settings), **more})]


def aggregator_command(
    settings: RunSettings, state: Path, more: Mapping[str, Any] = _NO_MORE
) -> list[str]:
    """`lesft-aggregator` for the run's clients."""
    own = {
        "run_id": settings.run_id,
        "clients": settings.clients,
        "state": state,
        "listen": _ANY_PORT,
        "control": _ANY_PORT,
    }
    if settings.tls:
        own["tls"] = "on"
    if settings.mode == "deadline":
        own |= {"quorum": settings.required, "deadline_seconds": settings.deadline_seconds}
    return [program("lesft-aggregator"), *options({**own, **more})]


def client_command(
    settings: RunSettings,
    model: str,
    state: Path,
    index: int,
    server: str,
    aggregator: str,
    more: Mapping[str, Any] = _NO_MORE,
) -> list[str]:
    """`lesft-client train` for one client and its share of the data.

    `server` is not used where the model is not split; without an `aggregator` there is none.
    """
    own: dict[str, Any] = {
        "client_id": client_name(index),
        "model": model,
        "state": state,
        "control": _ANY_PORT,
        "data": settings.data,
        "data_seed": settings.seed,
        "share": f"{index + 1}/{settings.clients}",
        "samples": settings.samples,
        "held_out": settings.held_out,
        "skew": settings.skew,
        "skew_alpha": settings.skew_alpha,
        "device": settings.device,
        "precision": settings.precision,
        "threads": settings.client_threads,
        "progress": "lines",
    }
    if settings.split:
        own |= {"server": server, "weights": settings.weights, "cache": settings.cache}
    else:
        own |= {"local": True, "run": _run_options(settings)}
    if aggregator:
        own["aggregator"] = aggregator
    if settings.tls:
        own |= {"identity": state / "identity", "enrol_with": enrolment_tokens(settings, state)}
    return [program("lesft-client"), "train", *options({**own, **more})]


def evaluate_command(
    settings: RunSettings, model: str, output: Path, adapter: Path | None, share: tuple[int, int]
) -> list[str]:
    """`lesft-client evaluate` on test questions, by the whole model on this machine.

    Without an `adapter` it is as it was before. `share` is (I, N): only every N-th question, from
    the I-th on, counted from 1.
    """
    own: dict[str, Any] = {
        "local": True,
        "model": model,
        "device": settings.device,
        "precision": settings.precision,
        "threads": settings.server_threads,
        "benchmark": settings.data,
        "data_seed": settings.seed,
        "questions": settings.questions,
        "share": f"{share[0]}/{share[1]}",
        "measure": settings.measure,
        "output": output,
        "max_tokens": settings.max_tokens,
        "batch": _ANSWERS_AT_ONCE,
        "progress": "lines",
    }
    own |= {"untuned": True} if adapter is None else {"adapter": adapter}
    return [program("lesft-client"), "evaluate", *options(own)]


def serve_command(settings: RunSettings, model: str, state: Path, server: str) -> list[str]:
    """`lesft-client serve` by the client of `state`."""
    own = {
        "server": server,
        "model": model,
        "weights": settings.weights,
        "cache": settings.cache,
        "device": settings.device,
        "precision": settings.precision,
        "threads": settings.client_threads,
        "state": state,
    }
    return [program("lesft-client"), "serve", *options(own)]


def enrolment_tokens(settings: RunSettings, state: Path) -> list[Path]:
    """Files for the tokens that a client enrols with, in its state folder."""
    needed = {"server": settings.split, "aggregator": settings.needs_aggregator}
    return [state / f"{service}.token" for service, is_there in needed.items() if is_there]


def _run_options(settings: RunSettings) -> dict[str, Any]:
    run = settings.model_dump(mode="json", include=set(RunOptions.model_fields))
    return {**run, "rounds": settings.num_rounds}


def program(name: str) -> str:
    """The command beside the Python that runs the testbed: the same environment."""
    return str(Path(sys.executable).with_name(name))


def options(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings as the words of a command line; nested ones with dots."""
    for name, value in values.items():
        option = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            yield from options(value, f"{option}.")
        elif isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        elif isinstance(value, list):
            # An empty one cannot be written, and is the default wherever it may be.
            yield from [f"--{option}={','.join(map(str, value))}"] if value else ()
        else:
            yield f"--{option}={value}"
