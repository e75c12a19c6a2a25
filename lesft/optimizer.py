"""AdamW with its schedule and clipping, the same on both sides of the cut."""

import math
from collections.abc import Iterable

import torch

from lesft.errors import InvalidInput
from lesft.spec import OptimizerSpec


def learning_rate_factor(spec: OptimizerSpec, round_index: int, rounds: int) -> float:
    """The learning rate of a round (counted from 0) as a part of its peak, in [0, 1]."""
    if round_index < spec.warmup_rounds:
        return (round_index + 1) / (spec.warmup_rounds + 1)
    if spec.schedule == "constant":
        return 1.0
    progress = (round_index - spec.warmup_rounds) / max(1, rounds - spec.warmup_rounds)
    if spec.schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class Optimizer:
    """AdamW over one side's adapters: clip, step, next learning rate, zero the gradient."""

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], spec: OptimizerSpec, rounds: int
    ) -> None:
        self._parameters = list(parameters)
        self._max_grad_norm = spec.max_grad_norm or math.inf
        self._adamw = torch.optim.AdamW(
            self._parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adamw, lambda round_index: learning_rate_factor(spec, round_index, rounds)
        )

    def step(self) -> float:
        """End an accumulation window; return the gradient's norm before clipping.

        Raises InvalidInput when the norm is not finite: then nothing has changed.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            raise InvalidInput(
                f"the gradient's norm must be finite, got {float(norm)}: lower "
                "optimizer.learning_rate or set optimizer.max_grad_norm, which clips the gradient"
            )
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
        self._adamw.step()
        self._schedule.step()
        self._adamw.zero_grad(set_to_none=True)
        return float(norm)
