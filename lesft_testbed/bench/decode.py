"""The part `decode`: writing text with a split model, against the whole model in one process.

A short run makes an adapter. Its server is started again, and texts are written by a client of it,
and by the library's `generate` with the same adapter. All write the same texts: the likeliest
tokens after the same prompts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lesft.control import ENDPOINTS_FILE
from lesft_testbed.bench.jobs import run_program, run_training, start_service
from lesft_testbed.bench.part import Alternative, Bench, Figure, ratio
from lesft_testbed.commands import client_name
from lesft_testbed.processes import Processes
from lesft_testbed.serve import COMMANDS_FILE

_WHOLE, _SPLIT, _GUESSES, _AT_ONCE = "whole", "split", "split, guesses", "split, at once"
_SERVER = "server"

_ONE_ROUND = {"method": "splitlora", "clients": 1, "rounds": 1}

_PLACES = ("harbour", "village", "forest", "castle", "desert", "library", "island", "market")
_PROMPTS = [f"Once upon a time, in a {place} far away, there lived" for place in _PLACES]


class Decode:
    """Tokens per second of texts, split and whole."""

    name = "decode"
    about = (
        "Tokens per second of the same texts: by the whole model in one process, and split between "
        "server and client, one text after another without guesses and with them, and all at once."
    )
    depends_on = ("model", "data", "samples", "seed", "threads")
    is_exact = False
    figures = (
        Figure(
            "decode_vs_whole",
            "tokens/s of one text at a time, split, without guesses / of the whole model",
            ratio(_SPLIT, _WHOLE, "tokens_per_second"),
            0.85,
            at_least=True,
        ),
        Figure(
            "decode_guesses_vs_whole",
            "tokens/s of one text at a time, split, with guesses / of the whole model",
            ratio(_GUESSES, _WHOLE, "tokens_per_second"),
            0.85,
            at_least=True,
        ),
        Figure(
            "decode_at_once",
            "tokens/s of all texts at once, split / of one text at a time, both without guesses",
            ratio(_AT_ONCE, _SPLIT, "tokens_per_second"),
            3.0,
            at_least=True,
        ),
    )

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        """The whole model, and clients of one server that stays up."""
        run_training(bench, "trained", _ONE_ROUND)
        run = bench.scratch / "trained"
        with Processes(run) as processes:
            command = json.loads((run / COMMANDS_FILE).read_bytes())["server"]
            (processes.state_of(_SERVER) / ENDPOINTS_FILE).unlink()
            split = {
                "server": start_service(processes, _SERVER, command),
                "state": str(processes.state_of(client_name(0))),
            }
            ways: dict[str, dict[str, Any]] = {
                _WHOLE: {"adapter": str(run / "adapter")},
                _SPLIT: {**split, "guesses": 0, "at_once": False},
                _GUESSES: {**split, "guesses": None, "at_once": False},
                _AT_ONCE: {**split, "guesses": 0, "at_once": True},
            }
            texts: list[list[int]] = []
            yield [
                Alternative(name, partial(measure, bench, way, texts)) for name, way in ways.items()
            ]


def measure(bench: Bench, way: Mapping[str, Any], texts: list[list[int]]) -> dict[str, float]:
    """Write all texts one way; `texts` keeps the token ids of the first time."""
    own = bench.settings.decode
    request = {
        "model": bench.model,
        "threads": bench.settings.num_threads,
        "prompts": _PROMPTS[: own.texts],
        "tokens": own.tokens,
        **way,
    }
    answer = run_program(bench, "writing", "writing", request)
    texts[:] = texts or answer["texts"]
    same = [ours == first for ours, first in zip(answer["texts"], texts, strict=True)]
    written = sum(map(len, answer["texts"]))
    return {
        "tokens_per_second": written / answer["seconds"],
        "tokens": written,
        "tokens_per_round_trip": written / answer["round_trips"],
        "same_texts_share": sum(same) / len(same),
    }
