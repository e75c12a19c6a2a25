"""A limit on the norm of each token's hidden state: one client must not drown the others.

Shape letters: N tokens, D width.
"""

from typing import Literal

import torch

from lesft.errors import InvalidInput
from lesft.refusals import Refusals

NormPolicy = Literal["refuse", "clip"]


class ActivationNorms:
    """The rule for what clients send; says what it did to `refusals`."""

    def __init__(self, max_norm: float, policy: NormPolicy, refusals: Refusals) -> None:
        """`max_norm` 0 stands for no limit."""
        self._max_norm = max_norm
        self._policy = policy
        self._refusals = refusals

    def admit(self, name: str, activations_ND: torch.Tensor) -> torch.Tensor:
        """The activations themselves; longer ones are cut down to the limit in a copy, or refused.

        In their dtype. Raises InvalidInput.
        """
        if not self._max_norm:
            return activations_ND
        # In float64: squares of what float32 can hold would not fit into float32.
        norms_N1 = torch.linalg.vector_norm(activations_ND.double(), dim=-1, keepdim=True)
        largest = float(norms_N1.max())
        if largest <= self._max_norm:
            return activations_ND
        if self._policy == "refuse":
            self._refusals.inc("activation norm refused")
            raise InvalidInput(
                f"tensor {name!r} has a hidden state of norm {largest:.3g}, but at most "
                f"{self._max_norm:g} is taken (--max-activation-norm): check the client's front "
                "and its precision"
            )
        self._refusals.inc("activation norm clipped")
        scales_N1 = (self._max_norm / norms_N1).clamp(max=1)
        clipped_ND: torch.Tensor = (activations_ND.double() * scales_N1).to(activations_ND.dtype)
        return clipped_ND
