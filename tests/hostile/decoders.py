"""Hostile messages against every decoder, counted, timed and measured."""

import resource
import time
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from google.protobuf.message import DecodeError

from lesft.errors import LesftError
from tests.hostile.client_decoders import client_decoders
from tests.hostile.served_decoders import Decoder, served_decoders

REFUSALS = (LesftError, DecodeError)
"""What a decoder may raise; gRPC's layer turns DecodeError into InvalidInput."""


@dataclass
class Outcome:
    """What became of the messages to one decoder."""

    messages: int = 0
    decoded: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    slowest_seed: str = ""
    peak_bytes: int = 0
    """Most that Python held more than before during one of the messages that were measured."""
    faults: list[str] = field(default_factory=list)
    """Seeds of messages that came to another end, and what it was."""


def all_decoders(folder: Path) -> dict[str, Decoder]:
    """The decoders of all services and of the client."""
    return served_decoders(folder) | client_decoders(folder)


def run_decoders(
    decoders: Mapping[str, Decoder], messages: int, seed: int = 0, measure_every: int = 0
) -> dict[str, Outcome]:
    """So many messages in turn to all decoders; of every `measure_every`th memory is measured."""
    outcomes = {name: Outcome() for name in decoders}
    turns = list(decoders.items())
    for number in range(messages):
        name, decode = turns[number % len(turns)]
        measured = measure_every and (number // len(turns)) % measure_every == 0
        run_one(name, decode, f"{seed}:{name}:{number}", outcomes[name], bool(measured))
    return outcomes


def run_one(name: str, decode: Decoder, seed: str, outcome: Outcome, measured: bool) -> None:
    """One message, named by its seed for good."""
    if measured:
        tracemalloc.start()
    start = time.thread_time()  # what it costs, however busy the machine is
    try:
        decode(Random(seed))
        outcome.decoded += 1
    except REFUSALS as error:
        outcome.refused[type(error).__name__] += 1
    except Exception as error:
        outcome.faults.append(f"{seed}: {type(error).__name__}: {str(error)[:200]}")
    seconds = time.thread_time() - start
    outcome.messages += 1
    if measured:
        outcome.peak_bytes = max(outcome.peak_bytes, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    elif seconds > outcome.slowest_seconds:
        outcome.slowest_seconds, outcome.slowest_seed = seconds, seed


def resident_mib() -> float:
    """Resident memory of this process at its peak, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(outcomes: Mapping[str, Outcome]) -> str:
    """One line a decoder."""
    head = f"{'decoder':34}{'messages':>9}{'decoded':>9}{'refused':>9}{'faults':>7}"
    lines = [f"{head}{'slowest ms':>12}{'peak KiB':>10}"]
    for name, outcome in outcomes.items():
        refused = sum(outcome.refused.values())
        lines.append(
            f"{name:34}{outcome.messages:9}{outcome.decoded:9}{refused:9}{len(outcome.faults):7}"
            f"{outcome.slowest_seconds * 1000:12.1f}{outcome.peak_bytes / 1024:10.0f}"
        )
    return "\n".join(lines)
