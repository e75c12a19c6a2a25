"""A limit on the norm of a client's adapter: one client must not drown the others in the mean."""

from typing import Literal

import numpy as np
from safetensors.numpy import load, save

from lesft.errors import InvalidInput
from lesft.refusals import Refusals

NormPolicy = Literal["refuse", "clip"]


class AdapterNorms:
    """The rule for what clients submit; says what it did to `refusals`."""

    def __init__(self, max_norm: float, policy: NormPolicy, refusals: Refusals) -> None:
        """`max_norm` is the Frobenius norm over all tensors; 0 stands for no limit."""
        self._max_norm = max_norm
        self._policy = policy
        self._refusals = refusals

    def admit(self, data: bytes) -> bytes:
        """The bytes of a checked adapter; those of a larger one are of one scaled down, or refused.

        Raises InvalidInput.
        """
        if not self._max_norm:
            return data
        tensors = load(data)
        # In float64: squares of what float32 can hold would not fit into float32.
        squares = [float(np.square(tensor, dtype=np.float64).sum()) for tensor in tensors.values()]
        norm = float(np.sqrt(sum(squares)))
        if norm <= self._max_norm:
            return data
        if self._policy == "refuse":
            self._refusals.inc("adapter norm refused")
            raise InvalidInput(
                f"the adapter has a norm of {norm:.3g}, but at most {self._max_norm:g} is taken "
                "(--max-adapter-norm): lower the learning rate or clip the gradient"
            )
        self._refusals.inc("adapter norm clipped")
        scale = np.float64(self._max_norm / norm)
        return save({name: (tensor * scale).astype(np.float32) for name, tensor in tensors.items()})
