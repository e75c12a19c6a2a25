"""The part `batching`: one step of the server's model for all clients, or one for each.

The step is what the server's metrics call `back`: forward and backward through its part of the
model, here in a process that does nothing else. Both ways get the same activations and must come
to the same losses. What is batched is padded to its longest sequence; how much that costs shows
beside samples that are all of one length.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lesft.spec import RunOptions
from lesft_testbed.bench.jobs import run_program
from lesft_testbed.bench.part import Alternative, Bench, Figure, ratio

_BATCHED, _ONE_BY_ONE = "batched", "one by one"
_SAME_LENGTH = ", same length"
_TARGET = 0.80


class Batching:
    """Time of the server's step for a cohort, whole and client by client."""

    name = "batching"
    about = (
        "Seconds of forward and backward through the server's part of the model for one "
        "micro-batch of every client: all at once, and one client after another; with the "
        "samples as they are and with samples of one length."
    )
    depends_on = ("model", "data", "samples", "seed", "threads")
    is_exact = False
    figures = (
        Figure(
            "server_batching",
            "server's step for all clients at once / the sum of its steps for one client "
            "after another",
            ratio(_BATCHED, _ONE_BY_ONE, "step_seconds"),
            _TARGET,
        ),
        Figure(
            "server_batching_same_length",
            "the same with samples of one length, so that nothing is padded",
            ratio(_BATCHED + _SAME_LENGTH, _ONE_BY_ONE + _SAME_LENGTH, "step_seconds"),
            _TARGET,
        ),
    )

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        """Step by step by turns in one process, which the first alternative starts."""
        request, answers = _request(bench), list[dict[str, Any]]()

        def measure(name: str) -> Callable[[], Mapping[str, float]]:
            def of_this_repeat() -> Mapping[str, float]:
                if name == _BATCHED:
                    answers.append(run_program(bench, "steps", "cohort_steps", request))
                values: Mapping[str, float] = answers[-1][name]
                return values

            return of_this_repeat

        names = (_BATCHED, _ONE_BY_ONE, _BATCHED + _SAME_LENGTH, _ONE_BY_ONE + _SAME_LENGTH)
        yield [Alternative(name, measure(name)) for name in names]


def _request(bench: Bench) -> dict[str, Any]:
    """For all four alternatives, on the first samples that the clients of a run draw."""
    settings, own = bench.settings, bench.settings.batching
    steps = own.skipped_steps + own.steps
    run = RunOptions(clients=own.clients, rounds=steps, accumulation=1, seed=settings.seed)
    drawn = run_program(
        bench,
        "drawn",
        "drawn",
        {
            **run.model_dump(mode="json"),
            "model": bench.model,
            "data": settings.data,
            "samples": settings.samples,
        },
    )
    cohorts = [
        [sample for client in window[0] for sample in client] for window in drawn["micro_batches"]
    ]
    return {
        "model": bench.model,
        "threads": settings.num_threads,
        "skipped_steps": own.skipped_steps,
        "cohorts": {"": cohorts, _SAME_LENGTH: [same_length(cohort) for cohort in cohorts]},
    }


Sample = Mapping[str, Sequence[int]]
"""Token ids of `base`, `reference` and `target`."""


def same_length(samples: Sequence[Sample]) -> list[dict[str, list[int]]]:
    """As many samples with nearly as many tokens, all of one length on each path."""
    means = {
        path: round(sum(len(sample[path]) for sample in samples) / len(samples))
        for path in samples[0]
    }
    return [
        {path: [ids[i % len(ids)] for i in range(means[path])] for path, ids in sample.items()}
        for sample in samples
    ]
