"""Steps of the server's part of a model, for a cohort at once and client by client: a program.

JSON in and JSON out. One sample is one client's micro-batch. The optimizer takes no step, which is
the same either way: so all steps are of the same model.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lesft.adapters import attach_lora
from lesft.back import Back
from lesft.cohort_batch import Part
from lesft.errors import InternalError
from lesft.hub import model_folder
from lesft.micro_batch import MicroBatch, StepKey, Targets
from lesft.micro_batch import Path as TokenPath
from lesft.spec import RunSpec
from lesft.split import default_cut_layer, front_forward
from lesft.weights import Checkpoint, load_back, load_front

_KEY = StepKey(0, 0)
_BEFORE_THE_LAST = 2
"""Micro-batches a round: the one measured is never the last, after which the optimizer steps."""
_SAME_LOSS = 1e-3


def measured_steps(request: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Alternative to values, "batched" and "one by one" for each of the request's `cohorts`.

    The request has `model`, `threads`, `skipped_steps`, and `cohorts`: what to add to the
    alternatives' names, and the samples, step by step and client by client.
    """
    torch.set_num_threads(request["threads"])
    checkpoint = Checkpoint(model_folder(request["model"]))
    spec = _spec(checkpoint)
    front = load_front(checkpoint, spec.cut_layer, torch.float32, torch.device("cpu"))
    parts = {
        name: [[_part(front, i, s, len(step)) for i, s in enumerate(step)] for step in steps]
        for name, steps in request["cohorts"].items()
    }
    del front
    model = load_back(checkpoint, spec.cut_layer, torch.float32, torch.device("cpu"))
    attach_lora(model, spec.lora, spec.seed, spec.cut_layer)
    back = Back(model, spec)
    answer: dict[str, dict[str, float]] = {}
    for name, steps in parts.items():
        batched, one_by_one = _Alternative(), _Alternative()
        for number, cohort in enumerate(steps):
            ways = (batched, [cohort]), (one_by_one, [[part] for part in cohort])
            losses = [way.take(back, batches) for way, batches in ways]
            check_same_losses(*losses)
            if number < request["skipped_steps"]:
                batched, one_by_one = _Alternative(), _Alternative()
        answer |= {f"batched{name}": batched.values(), f"one by one{name}": one_by_one.values()}
    return answer


@dataclass
class _Alternative:
    """One way of taking the same steps."""

    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0

    def take(self, back: Back, batches: Sequence[Sequence[Part]]) -> list[float]:
        """One step of the cohort in these batches; each client's loss."""
        start, cpu_start = time.monotonic(), time.process_time()
        results = [result for batch in batches for result in back.train_step(_KEY, batch)]
        self.seconds += time.monotonic() - start
        self.cpu_seconds += time.process_time() - cpu_start
        self.steps += 1
        for batch in batches:
            for lengths in _lengths_by_path(batch):
                self.tokens += sum(lengths)
                self.padded_tokens += max(lengths) * len(lengths)
        return [result.loss for result in results]

    def values(self) -> dict[str, float]:
        """Per step of the cohort; tokens are those of both paths."""
        return {
            "step_seconds": self.seconds / self.steps,
            "step_cpu_seconds": self.cpu_seconds / self.steps,
            "tokens": self.tokens / self.steps,
            "padding_share": 1 - self.tokens / self.padded_tokens,
        }


def check_same_losses(batched: Sequence[float], one_by_one: Sequence[float]) -> None:
    """Both ways must do the same work. Raises InternalError where a client's losses differ."""
    for ours, alone in zip(batched, one_by_one, strict=True):
        if not math.isclose(ours, alone, rel_tol=_SAME_LOSS):
            raise InternalError(
                f"a client's loss is {ours:.6f} in the batch and {alone:.6f} by itself: they are "
                "not the same steps"
            )


def _spec(checkpoint: Checkpoint) -> RunSpec:
    cut = default_cut_layer(checkpoint.config.num_hidden_layers)
    return RunSpec(
        rounds=1,
        accumulation=_BEFORE_THE_LAST,
        model_name="",
        front_fingerprint="",
        cut_layer=cut,
    )


def _part(front: Any, index: int, sample: Mapping[str, list[int]], clients: int) -> Part:
    """What a client with this sample sends."""
    target = sample["target"]
    base, reference = (_activations(front, sample[p] + target) for p in ("base", "reference"))
    targets = Targets(torch.tensor(target), (len(target),))
    return Part(f"client-{index}", MicroBatch(_KEY, base, reference, targets), 1 / clients)


@torch.no_grad()
def _activations(front: Any, ids: list[int]) -> TokenPath:
    return TokenPath(front_forward(front, torch.tensor([ids]))[0], (len(ids),))


def _lengths_by_path(batch: Sequence[Part]) -> list[tuple[int, ...]]:
    micro_batches = [part.micro_batch for part in batch]
    paths = ([b.base for b in micro_batches], [b.reference for b in micro_batches if b.reference])
    return [tuple(n for path in same for n in path.lengths) for same in paths]


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:])
    answered.write_text(json.dumps(measured_steps(json.loads(asked.read_bytes()))))
