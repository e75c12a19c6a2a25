"""AdamW with its schedule and clipping, the same on both sides of the cut."""

import math
from collections.abc import Iterable, Mapping

import torch

from lesft.errors import InvalidInput
from lesft.spec import OptimizerSpec
from lesft.tensors import TensorSpec, check_tensors

_STEPS = "optimizer.steps"
_MOMENTS = ("exp_avg", "exp_avg_sq")


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
        self._spec = spec
        self._rounds = rounds
        self._max_grad_norm = spec.max_grad_norm or math.inf
        self._adamw = torch.optim.AdamW(
            self._parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        self.steps = 0

    def step(self, round_index: int) -> float:
        """End the accumulation window of a round; return the gradient's norm before clipping.

        The learning rate is the round's: whoever has missed some rounds has taken fewer steps.

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
        factor = learning_rate_factor(self._spec, round_index, self._rounds)
        for group in self._adamw.param_groups:
            group["lr"] = self._spec.learning_rate * factor
        self._adamw.step()
        self.steps += 1
        self.drop_gradients()
        return float(norm)

    def drop_gradients(self) -> None:
        """Forget what has accumulated since the last step."""
        self._adamw.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------ checkpoints

    def state(self, named: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        """Copies on the CPU of all that `load_state` needs; `named` are all the parameters.

        `optimizer.steps` int64 `[1]`, and after the first step `exp_avg.NAME` and `exp_avg_sq.NAME`
        of every parameter, in its shape and dtype.
        """
        tensors = {_STEPS: torch.tensor([self.steps])}
        if self.steps:
            for name, parameter in named.items():
                for moment in _MOMENTS:
                    value = self._adamw.state[parameter][moment]
                    tensors[f"{moment}.{name}"] = value.to("cpu", copy=True).contiguous()
        return tensors

    def load_state(
        self, named: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Go on from a `state`. Raises BundleError, changing nothing, unless it is one of these."""
        check_tensors({_STEPS: tensors[_STEPS]}, {_STEPS: TensorSpec((1,), (torch.int64,))})
        steps = int(tensors[_STEPS])
        expected = {_STEPS: TensorSpec((1,), (torch.int64,))}
        for name, parameter in named.items() if steps else ():
            for moment in _MOMENTS:
                expected[f"{moment}.{name}"] = TensorSpec(
                    tuple(parameter.shape), (parameter.dtype,)
                )
        check_tensors(tensors, expected)
        self.steps = steps
        self._adamw.state.clear()
        self.drop_gradients()
        for name, parameter in named.items() if steps else ():
            self._adamw.state[parameter] = {
                # As AdamW has it: on the CPU, of torch's default dtype.
                "step": torch.tensor(float(steps)),
                **{
                    moment: tensors[f"{moment}.{name}"].to(parameter.device, copy=True)
                    for moment in _MOMENTS
                },
            }
