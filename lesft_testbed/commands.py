"""The command lines of the three services, from the testbed's settings; all ports are free ones.

`more` are options beside these or, like a fixed port, instead of them.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lesft.spec import RunOptions
from lesft_testbed.settings import RunSettings

_ANY_PORT = "127.0.0.1:0"
_MOST_TOKENS_OF_AN_ANSWER = 160
_NO_MORE: Mapping[str, Any] = {}


def client_name(index: int) -> str:
    """The id of the client with this index, from 0."""
    return f"client-{index}"


def server_command(
    settings: RunSettings, model: str, state: Path, more: Mapping[str, Any] = _NO_MORE
) -> list[str]:
    """`lesft-server` with the run's options."""
    run = settings.model_dump(mode="json", include=set(RunOptions.model_fields))
    run["rounds"] = settings.num_rounds
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
    return [_program("lesft-server"), *_options({**own, **run, **more})]


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
    if settings.mode == "deadline":
        own |= {"quorum": settings.required, "deadline_seconds": settings.deadline_seconds}
    return [_program("lesft-aggregator"), *_options({**own, **more})]


def client_command(
    settings: RunSettings,
    model: str,
    state: Path,
    index: int,
    server: str,
    aggregator: str,
    more: Mapping[str, Any] = _NO_MORE,
) -> list[str]:
    """`lesft-client train` for one client and its share of the data."""
    own = {
        "client_id": client_name(index),
        "server": server,
        "aggregator": aggregator,
        "model": model,
        "state": state,
        "control": _ANY_PORT,
        "data": settings.data,
        "data_seed": settings.seed,
        "share": f"{index + 1}/{settings.clients}",
        "samples": settings.samples,
        "held_out": settings.held_out,
        "weights": settings.weights,
        "cache": settings.cache,
        "device": settings.device,
        "precision": settings.precision,
        "threads": settings.client_threads,
        "progress": "lines",
    }
    return [_program("lesft-client"), "train", *_options({**own, **more})]


def evaluate_command(
    settings: RunSettings, model: str, state: Path, server: str, output: Path, untuned: bool
) -> list[str]:
    """`lesft-client evaluate` on test questions, by the client of `state` or as before training."""
    own = {
        **_answering(settings, model, server),
        "benchmark": settings.data,
        "data_seed": settings.seed,
        "questions": settings.questions,
        "output": output,
        "max_tokens": _MOST_TOKENS_OF_AN_ANSWER,
        "progress": "lines",
    }
    which = ["--untuned"] if untuned else [f"--state={state}"]
    return [_program("lesft-client"), "evaluate", *_options(own), *which]


def serve_command(settings: RunSettings, model: str, state: Path, server: str) -> list[str]:
    """`lesft-client serve` by the client of `state`."""
    own = {**_answering(settings, model, server), "state": state}
    return [_program("lesft-client"), "serve", *_options(own)]


def _answering(settings: RunSettings, model: str, server: str) -> dict[str, Any]:
    return {
        "server": server,
        "model": model,
        "weights": settings.weights,
        "cache": settings.cache,
        "device": settings.device,
        "precision": settings.precision,
        "threads": settings.client_threads,
    }


def _program(name: str) -> str:
    """The command beside the Python that runs the testbed: the same environment."""
    return str(Path(sys.executable).with_name(name))


def _options(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        option = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            yield from _options(value, f"{option}.")
        elif isinstance(value, list):
            yield f"--{option}={','.join(map(str, value))}"
        else:
            yield f"--{option}={value}"
