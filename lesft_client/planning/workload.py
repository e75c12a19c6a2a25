"""What the run will bring this device to do: the micro-batches of its own data."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from lesft.spec import RunSpec
from lesft_client.data import EncodedSample, sample_index

_MOST_MICRO_BATCHES = 4096
"""Of a long run that are looked at."""


class Tokens(NamedTuple):
    """Of one micro-batch, or a mean over several."""

    base: float
    reference: float
    """On the reference path; 0 where the loss needs none."""
    targets: float


class Workload(BaseModel):
    """The micro-batches of one client's run, on average."""

    model_config = ConfigDict(frozen=True)

    tokens: Tokens
    """Where all of a micro-batch is sent."""
    most_tokens: int
    """Of the largest micro-batch, on its larger path."""
    window_tokens: int
    """On the base path: those of all micro-batches that are in flight at once, at most."""
    window_sent_tokens: int
    """The same, of all that is sent."""
    fresh_share: float
    """Of the samples drawn: how many need to be sent whole, where the server keeps something."""


def micro_batches(
    spec: RunSpec, samples: Sequence[EncodedSample], client_id: str
) -> list[list[EncodedSample]]:
    """The run's first micro-batches, in its order."""
    count = min(spec.rounds * spec.accumulation, _MOST_MICRO_BATCHES)
    return [
        [
            samples[sample_index(spec.seed, client_id, position, len(samples))]
            for position in range(number * spec.batch_size, (number + 1) * spec.batch_size)
        ]
        for number in range(count)
    ]


def workload(
    spec: RunSpec,
    batches: Sequence[Sequence[EncodedSample]],
    num_samples: int,
    in_flight: int,
) -> Workload:
    """What `batches` come to; `in_flight` of them are under way at once."""
    counts = [tokens_of(batch, spec) for batch in batches]
    means = (sum(column) / len(counts) for column in zip(*counts, strict=True))
    base, sent = (
        max(sum(sizes[start : start + in_flight]) for start in range(len(sizes)))
        for sizes in (
            [tokens.base for tokens in counts],
            [tokens.base + tokens.reference for tokens in counts],
        )
    )
    return Workload(
        tokens=Tokens(*means),
        most_tokens=int(max(max(tokens.base, tokens.reference) for tokens in counts)),
        window_tokens=int(base),
        window_sent_tokens=int(sent),
        fresh_share=fresh_share(spec, num_samples),
    )


def tokens_of(batch: Sequence[EncodedSample], spec: RunSpec) -> Tokens:
    """The tokens of one micro-batch."""
    targets = sum(len(sample.target_ids) for sample in batch)
    base = targets + sum(len(sample.base_ids) for sample in batch)
    reference = targets + sum(len(sample.reference_ids) for sample in batch)
    return Tokens(base, reference if spec.loss.needs_reference else 0, targets)


def fresh_share(spec: RunSpec, num_samples: int) -> float:
    """Of the samples drawn: how many the server does not hold anything of, over the whole run.

    All of them, unless it remembers the reference path or keeps the activations of a client that
    does not train: then those of the first epoch, and of each in which they are due anew.
    """
    if not spec.names_samples:
        return 1.0
    drawn = spec.rounds * spec.accumulation * spec.batch_size
    epochs = max(1.0, drawn / num_samples)
    last = math.ceil(epochs)
    every = spec.loss.reference_refresh if spec.loss.remembers_reference else 0
    return sum(min(1.0, epochs - epoch) for epoch in range(0, last, every or last)) / epochs
