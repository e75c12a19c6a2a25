"""The part `wire`: bytes between clients and services, against the paper's protocol.

The paper gives no byte counts and no formula; its protocol is METHOD section 3, steps 2, 3 and 6:
each client uploads S_i and S~_i, the server concatenates all clients' activations and runs its part
on them, and the gradient of both is returned. What is concatenated must be of one length, so the
padding unit is the cohort's micro-batch: all clients' sequences of one (round, micro-batch) and one
path, as long as the longest of them. Steps 8 to 10 send every client's adapter up and the average
down, as often as ours. Two bytes a number. Labels, headers and calls are not counted for the
paper's protocol, and are for ours.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lesft_testbed.bench.jobs import drawn_samples, run_training
from lesft_testbed.bench.part import Alternative, Bench, Figure, ratio
from lesft_testbed.report import Report

_BYTES_PER_NUMBER = 2

_LEAN = {
    "activation_encoding": "int4",
    "gradient_encoding": "int4",
    "adapter_encoding": "int4",
    "loss": {"reference_refresh": "once"},
}
_DIRECTIONS = 2

MicroBatch = Sequence[Sequence[Mapping[str, Sequence[int]]]]
"""Client, sample: token ids of `base`, `reference` and `target`."""


class Wire:
    """Bytes that all clients send and receive in an epoch: by default, and at the least."""

    name = "wire"
    about = (
        "Bytes per epoch at default settings and at the leanest ones, against the paper's protocol "
        "for these samples."
    )
    depends_on = ("model", "data", "samples", "seed")
    is_exact = True
    figures = (
        Figure(
            "wire_ratio_default",
            "all bytes of an epoch at default settings / fp16 activations and gradients of both "
            "paths in both directions, padded",
            ratio("default", "paper", "bytes_per_epoch"),
            0.35,
        ),
        Figure(
            "wire_ratio_best",
            "the same at the leanest settings: int4 for all, the reference path once",
            ratio("lean", "paper", "bytes_per_epoch"),
            0.12,
        ),
    )

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        """A real run at default settings, and the paper's bytes for what that run has drawn."""
        reports: list[Report] = []

        def run(**options: Any) -> dict[str, float]:
            own = bench.settings.wire
            size = {"clients": own.clients, "epochs": own.epochs}
            reports.append(run_training(bench, f"wire-{len(reports)}", {**size, **options}))
            return counted(reports[-1])

        def paper() -> dict[str, float]:
            drawn = drawn_samples(bench, reports[-1])
            micro_batches = [each for window in drawn["micro_batches"] for each in window]
            total = paper_bytes(micro_batches, drawn["hidden_size"])
            adapters = paper_adapter_bytes(reports[-1])
            passes = epochs(reports[-1])
            return {
                "bytes_per_epoch": (total + adapters) / passes,
                "adapters_bytes_per_epoch": adapters / passes,
            }

        yield (
            Alternative("default", run),
            Alternative("lean", partial(run, **_LEAN)),
            Alternative("paper", paper),
        )


def counted(report: Report) -> dict[str, float]:
    """What the clients counted, per epoch: all of it, and by direction and kind."""
    passes = epochs(report)
    ways = {
        f"{way}_bytes_per_epoch": sum(kind[way] for kind in report.wire.values()) / passes
        for way in ("up", "down")
    }
    kinds = {
        f"{kind}_bytes_per_epoch": (sizes["up"] + sizes["down"]) / passes
        for kind, sizes in report.wire.items()
    }
    return {"bytes_per_epoch": sum(ways.values()), **ways, **kinds}


def epochs(report: Report) -> float:
    """Passes over the clients' samples that a run has made; the last may be a part of one."""
    drawn = report.rounds * report.settings["accumulation"] * report.settings["batch_size"]
    return float(drawn * report.clients / sum(report.samples_by_client))


def paper_adapter_bytes(report: Report) -> int:
    """Bytes of all clients' adapters, up and down again as often as they were averaged."""
    interval: int = report.settings["aggregation_interval"]
    numbers = report.clients * report.client_trained_parameters
    averages = math.ceil(report.rounds / interval)
    return numbers * averages * _BYTES_PER_NUMBER * _DIRECTIONS


def paper_bytes(micro_batches: Sequence[MicroBatch], hidden_size: int) -> int:
    """Bytes of the paper's protocol for these cohort micro-batches; see the module."""
    tokens = 0
    for micro_batch in micro_batches:
        samples = [sample for client in micro_batch for sample in client]
        for path in ("base", "reference"):
            longest = max(len(sample[path]) + len(sample["target"]) for sample in samples)
            tokens += longest * len(samples)
    return tokens * hidden_size * _BYTES_PER_NUMBER * _DIRECTIONS
