"""The part `overhead`: what splitting the model costs in time, and what the second path costs.

A step is one round: all its micro-batches and the optimizer's step, the mean of the rounds after
the first few. Split runs are real processes on loopback; nothing is averaged between the measured
rounds, and no checkpoint taken, as none is in the whole model's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lesft.errors import InternalError
from lesft_testbed.bench.jobs import drawn_samples, run_program, run_training
from lesft_testbed.bench.part import Alternative, Bench, Figure, ratio
from lesft_testbed.report import Report
from lesft_testbed.settings import RunSettings

SPLIT, WHOLE, DUAL, CACHED = "splitlora", "whole", "lesft", "lesft-once"
_SAME_LOSS = 1e-3


class Overhead:
    """Time of a training step: split and whole, with one path, with both, and with both at first.

    With the reference path remembered, the first epoch's steps take both paths and the others one:
    its step is the mean over all steps of so many epochs, each epoch at the mean of its settled
    rounds.
    """

    name = "overhead"
    about = (
        "Seconds of a training step of one client: split between two processes, in one process "
        "with plain peft and torch, split with both paths, and split with a reference path that "
        "is remembered."
    )
    depends_on = ("model", "data", "samples", "seed", "threads")
    is_exact = False
    figures = (
        Figure(
            "overhead_vs_whole",
            "step of splitlora with one client on loopback / the same step in one process with "
            "peft, as many threads in each process",
            ratio(SPLIT, WHOLE, "step_seconds"),
            1.08,
        ),
        Figure(
            "dual_path_overhead",
            "step of lesft / step of splitlora",
            ratio(DUAL, SPLIT, "step_seconds"),
            1.45,
        ),
        Figure(
            "dual_path_overhead_cached",
            "step of lesft-once, mean over its epochs / step of splitlora",
            ratio(CACHED, SPLIT, "step_seconds"),
            1.10,
        ),
    )

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        """Split, whole on the samples that it has drawn, and split with both paths."""
        reports: list[Report] = []

        def split() -> dict[str, float]:
            reports.append(run_training(bench, f"split-{len(reports)}", options(bench, SPLIT)))
            return _steps(bench, reports[-1].model_dump())

        def whole() -> dict[str, float]:
            answer = _run_whole(bench, reports[-1])
            check_same_loss(answer["loss_by_round"][0], reports[-1].loss_by_round[0])
            return _steps(bench, answer)

        def dual() -> dict[str, float]:
            report = run_training(bench, f"dual-{len(reports)}", options(bench, DUAL))
            return _steps(bench, report.model_dump())

        def cached() -> dict[str, float]:
            own = bench.settings.overhead
            report = run_training(bench, f"cached-{len(reports)}", cached_options(bench))
            return mean_of_epochs(report.seconds_by_round, own.skipped_rounds, own.cached_epochs)

        yield (
            Alternative(SPLIT, split),
            Alternative(WHOLE, whole),
            Alternative(DUAL, dual),
            Alternative(CACHED, cached),
        )


def options(bench: Bench, method: str) -> dict[str, Any]:
    """Of the run of a method with one client, all of whose rounds are one interval.

    Raw, so that all alternatives begin with the same loss.
    """
    own = bench.settings.overhead
    rounds = own.skipped_rounds + own.rounds
    run = {"method": method, "clients": 1, "rounds": rounds, "aggregation_interval": rounds}
    return {**run, "activation_encoding": "raw", "gradient_encoding": "raw"}


def cached_options(bench: Bench) -> dict[str, Any]:
    """Of the run that remembers: an epoch has one round more than are skipped, or two."""
    own = bench.settings.overhead
    rounds_per_epoch = max(2, own.skipped_rounds + 1)
    rounds = rounds_per_epoch * own.cached_epochs
    return {
        **options(bench, CACHED),
        "samples": rounds_per_epoch * RunSettings.model_fields["accumulation"].default,
        "rounds": rounds,
        "aggregation_interval": rounds,
    }


def mean_of_epochs(seconds: Sequence[float], skipped_rounds: int, epochs: int) -> dict[str, float]:
    """The mean step over all epochs: the first one's as its settled rounds are."""
    per_epoch = len(seconds) // epochs
    first, later = seconds[skipped_rounds:per_epoch], seconds[per_epoch:]
    both, one = sum(first) / len(first), sum(later) / len(later)
    return {
        "step_seconds": (both + (epochs - 1) * one) / epochs,
        "first_epoch_step_seconds": both,
        "later_step_seconds": one,
    }


def _steps(bench: Bench, done: Mapping[str, Any]) -> dict[str, float]:
    """The mean step, after the first rounds; and the loss of the first, to compare by eye."""
    settled = done["seconds_by_round"][bench.settings.overhead.skipped_rounds :]
    return {
        "step_seconds": sum(settled) / len(settled),
        "first_loss": done["loss_by_round"][0],
    }


def _run_whole(bench: Bench, report: Report) -> dict[str, Any]:
    """The same rounds on the same samples in one process."""
    settings, drawn = report.settings, drawn_samples(bench, report)
    windows = [
        [sample for [samples] in window for sample in samples] for window in drawn["micro_batches"]
    ]
    request = {
        "model": bench.model,
        "threads": bench.settings.num_threads,
        "lora": settings["lora"],
        "optimizer": settings["optimizer"],
        "windows": windows,
    }
    return run_program(bench, "whole", "whole_model", request)


def check_same_loss(whole: float, split: float) -> None:
    """Fresh adapters change nothing yet: both must begin with the same loss on the same samples."""
    if not math.isclose(whole, split, rel_tol=_SAME_LOSS):
        raise InternalError(
            f"the whole model begins with loss {whole:.5f} and the split one with {split:.5f}: "
            "they do not train on the same"
        )
