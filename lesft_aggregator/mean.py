"""The data-size weighted mean of adapters (METHOD section 3, eq. 10-11). Pure numpy."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from lesft.adapter_codec import FloatArray


def weighted_mean(parts: Iterable[tuple[Path, int]]) -> dict[str, FloatArray]:
    """The mean of adapters, sum(n_i * x_i) / sum(n_i), tensor by tensor.

    `parts` are the safetensors files of float32 tensors with equal names and shapes, each with
    its weight n_i >= 1, in the order of the sum. Summed and divided in float64, rounded to
    float32 once at the end: equal adapters give that adapter back, bit for bit. One file is open
    at a time, so memory does not depend on their number: two to three times an adapter's size.
    """
    sums: dict[str, npt.NDArray[np.float64]] = {}
    total = 0
    for path, weight in parts:
        total += weight
        with safe_open(path, framework="np") as adapter:
            for name in adapter.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                term = np.asarray(adapter.get_tensor(name) * np.float64(weight))
                if name in sums:
                    sums[name] += term
                else:
                    sums[name] = term
    assert total > 0, "a mean needs at least one part with a positive weight"
    return {name: np.asarray(sums.pop(name) / total, np.float32) for name in sorted(sums)}
