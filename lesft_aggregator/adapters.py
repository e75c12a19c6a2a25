"""What the bytes of a client's adapter must be: float32, finite, the same tensors as everyone's."""

import math

import numpy as np

from lesft.adapter_codec import MAX_DIMENSIONS, Layout
from lesft.bundle import tensor_views
from lesft.errors import BundleError

_ENTRY_BYTES, _HEADER_BYTES = 256, 65536
"""Room for a tensor's entry in a safetensors header, and for what else may be in there."""

MAX_HEADER_BYTES = 1 << 20
"""Room for the names and shapes of an adapter's tensors: some thousands of them."""


def read_layout(data: bytes) -> Layout:
    """The layout of an adapter's safetensors bytes.

    Raises BundleError when they are no safetensors, hold nothing, or hold anything but finite
    float32 numbers.
    """
    tensors = tensor_views("adapter", data, MAX_HEADER_BYTES)
    if not tensors:
        raise BundleError("adapter holds no tensors: submit every LoRA tensor of the front")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor["dtype"], tensor["shape"], tensor["data"])
    return {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}


def _check_tensor(name: str, dtype: str, shape: list[int], data: bytearray) -> None:
    if dtype != "F32":
        raise BundleError(f"tensor {shown(name)} must be float32 (F32), got {dtype}")
    if len(shape) > MAX_DIMENSIONS:
        raise BundleError(
            f"tensor {shown(name)} may have {MAX_DIMENSIONS} dimensions, got {len(shape)}"
        )
    if math.prod(shape) == 0:
        raise BundleError(f"tensor {shown(name)} has no elements: its shape is {shown(shape)}")
    if not np.isfinite(np.frombuffer(data, dtype="<f4")).all():
        raise BundleError(
            f"tensor {shown(name)} has values that are NaN or infinite: lower the learning rate "
            "or clip the gradient"
        )


def most_bytes(layout: Layout) -> int:
    """What an adapter of float32 tensors of this layout can have, with its header."""
    header = sum(len(name) + _ENTRY_BYTES for name in layout) + _HEADER_BYTES
    return header + sum(math.prod(shape) * 4 for shape in layout.values())


def check_layout(layout: Layout, expected: Layout) -> None:
    """Refuse an adapter that cannot be averaged with the run's others.

    Raises BundleError that names the first tensor that differs.
    """
    for name in sorted(expected.keys() | layout.keys()):
        if name not in layout:
            raise BundleError(f"tensor {shown(name)} is missing; {_RULE}")
        if name not in expected:
            raise BundleError(f"tensor {shown(name)} is unknown; {_RULE}")
        if layout[name] != expected[name]:
            raise BundleError(
                f"tensor {shown(name)} must have shape {shown(list(expected[name]))}, got "
                f"{shown(list(layout[name]))}; {_RULE}"
            )


_RULE = "the run's first accepted adapter fixed the names and shapes for all"


def shown(value: object, limit: int = 100) -> str:
    """A value from the wire for an error message, cut short: it may be megabytes."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
