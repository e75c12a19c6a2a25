"""Adapters on their way to and from the aggregator: whole, or as what has changed since a version.

A step of AdamW changes every value by about the learning rate, so the change since the last average
takes few bits: 8 or 4 a value, with a scale for each 256 of a tensor. Unlike activations, changes
have no few channels of great magnitude, and need no rotation.

Both ends compute `base + change` with the same numpy operations on the same values, so that both
have the same adapter afterwards, to the last bit. Version 0, which nobody has averaged, is known to
the clients alone: what is based on it travels whole, in 8 bits. Loads no torch.
"""

import json
import math
import zlib
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError
from safetensors.numpy import save

from lesft.bundle import tensor_views
from lesft.entropy import deflate, inflate
from lesft.errors import BundleError, TooLarge
from lesft.spec import AdapterEncoding

FloatArray = npt.NDArray[np.float32]
Layout = dict[str, tuple[int, ...]]
"""Shape of each tensor of an adapter, by name."""

_BLOCK = 256
_LARGEST = {"int8": 127, "int4": 7}
_WHOLE: AdapterEncoding = "int8"
"""Of what is no change: the values that LoRA begins with are far larger than what training adds."""

_MAX_HEADER_BYTES = 4096
_MAX_LAYOUT_BYTES = 1 << 20

MAX_DIMENSIONS = 8
"""Of a tensor; numpy has a limit of its own, some of whose functions have a lower one."""

_Size = Annotated[int, Field(ge=1, lt=1 << 32)]
_Shape = Annotated[list[_Size], Field(max_length=MAX_DIMENSIONS, fail_fast=True)]
_LAYOUT = TypeAdapter(dict[str, _Shape])


def encode(
    adapter: Mapping[str, FloatArray], encoding: AdapterEncoding, base: Mapping[str, FloatArray]
) -> bytes:
    """The bundle of an adapter, float32, by what has changed since `base`, which may be empty.

    `base` has the same names and shapes. Not for `raw`.
    """
    values_N = _flat(adapter)
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    if base:
        values_N -= _flat(base)
    else:
        encoding = _WHOLE
        layout = {name: array.shape for name, array in sorted(adapter.items())}
        tensors["layout"] = _bytes(json.dumps(layout, separators=(",", ":")).encode())
    codes, tensors["scales"] = _quantized(values_N, _LARGEST[encoding])
    tensors["codes"] = _bytes(deflate(_packed(codes, encoding)))
    return save(tensors)


def most_bytes_per_value(encoding: AdapterEncoding) -> float:
    """Before codes are deflated, without names, shapes and padding; of what has a base."""
    bits = {"raw": 32.0, "int8": 8 + 32 / _BLOCK, "int4": 4 + 32 / _BLOCK}
    return bits[encoding] / 8


def decode(
    data: bytes, encoding: AdapterEncoding, base: Mapping[str, FloatArray], max_bytes: int
) -> dict[str, FloatArray]:
    """The adapter of a bundle from `encode`, if it has at most `max_bytes`; see `decoded_bytes`.

    Values may be infinite or NaN, which is for the caller to check. Raises BundleError when it is
    none for this base, TooLarge.
    """
    tensors = _read(data, {"codes": "U8", "scales": "F32"} | ({} if base else {"layout": "U8"}))
    layout: Layout
    if base:
        layout = {name: array.shape for name, array in base.items()}
    else:
        encoding, layout = _WHOLE, _read_layout(tensors["layout"])
    num_blocks = sum(_padded(math.prod(shape)) for shape in layout.values()) // _BLOCK
    num_bytes = num_blocks * _BLOCK * 4
    if num_bytes > max_bytes:
        raise TooLarge(
            f"adapter of {num_bytes} bytes once it is decoded, but at most {max_bytes} are accepted"
        )
    scales_K = np.frombuffer(tensors["scales"], dtype="<f4")
    if len(scales_K) != num_blocks:
        raise BundleError(
            f"adapter: scales must be {num_blocks} for these tensors, got {len(scales_K)}"
        )
    num_codes = num_blocks * _BLOCK
    packed_bytes = num_codes if encoding == "int8" else num_codes // 2
    packed = inflate("adapter: codes", bytes(tensors["codes"]), packed_bytes)
    with np.errstate(over="ignore", invalid="ignore"):
        values_N = (_unpacked(packed, encoding) * scales_K[:, None]).reshape(-1)
        if base:
            values_N += _flat(base)
    return _shaped(values_N, layout)


def decoded_bytes(adapter: Mapping[str, FloatArray]) -> int:
    """What decoding such an adapter takes for its values: each tensor begins a block of 256."""
    return 4 * sum(_padded(array.size) for array in adapter.values())


def checksum(adapter: Mapping[str, FloatArray]) -> int:
    """CRC-32 of an adapter's values, by which both ends know that they have the same; 0 of none."""
    return zlib.crc32(_flat(adapter).tobytes()) if adapter else 0


# ---------------------------------------------------------------------- values


def _flat(adapter: Mapping[str, FloatArray]) -> FloatArray:
    """All values, tensor by tensor in the order of names; zeros fill up a tensor's last block."""
    sizes = {name: _padded(adapter[name].size) for name in sorted(adapter)}
    values_N, start = np.zeros(sum(sizes.values()), np.float32), 0
    for name, size in sizes.items():
        values_N[start : start + adapter[name].size] = adapter[name].reshape(-1)
        start += size
    return values_N


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _shaped(values_N: FloatArray, layout: Layout) -> dict[str, FloatArray]:
    adapter, start = dict[str, FloatArray](), 0
    for name in sorted(layout):
        size = math.prod(layout[name])
        adapter[name] = values_N[start : start + size].reshape(layout[name])
        start += _padded(size)
    return adapter


def _quantized(values_N: FloatArray, largest: int) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Codes `[K, 256]` and scales `[K]`."""
    blocks_KB = values_N.reshape(-1, _BLOCK)
    scales_K = np.abs(blocks_KB).max(axis=1) / np.float32(largest)
    divisors_K = np.where(scales_K == 0, np.float32(1), scales_K)
    codes_KB = np.rint(blocks_KB / divisors_K[:, None]).clip(-largest, largest)
    return codes_KB.astype(np.int8), scales_K


def _packed(codes_KB: npt.NDArray[np.int8], encoding: AdapterEncoding) -> bytes:
    """Two codes of 4 bits, with 8 added, in a byte, the first in the low half."""
    if encoding == "int8":
        return codes_KB.tobytes()
    nibbles_KB = (codes_KB + 8).astype(np.uint8)
    return (nibbles_KB[:, 0::2] | nibbles_KB[:, 1::2] << 4).tobytes()


def _unpacked(packed: bytes, encoding: AdapterEncoding) -> npt.NDArray[np.int8]:
    """The codes of `_packed`."""
    if encoding == "int8":
        return np.frombuffer(packed, np.int8).reshape(-1, _BLOCK)
    pairs = np.frombuffer(packed, np.uint8)
    nibbles = np.stack((pairs & 15, pairs >> 4), axis=-1)
    return nibbles.reshape(-1, _BLOCK).astype(np.int8) - np.int8(8)


# ---------------------------------------------------------------------- bundles


def _bytes(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def _read(data: bytes, dtypes: Mapping[str, str]) -> dict[str, bytearray]:
    tensors = tensor_views("adapter", data, _MAX_HEADER_BYTES)
    found = {name: tensor["dtype"] for name, tensor in tensors.items()}
    if found != dtypes:
        expected = ", ".join(f"{name} ({dtype})" for name, dtype in sorted(dtypes.items()))
        got = ", ".join(f"{name[:40]} ({dtype})" for name, dtype in sorted(found.items()))
        raise BundleError(f"adapter: must hold {expected}, got {got[:200] or 'nothing'}")
    return {name: tensor["data"] for name, tensor in tensors.items()}


def _read_layout(data: bytearray) -> Layout:
    if len(data) > _MAX_LAYOUT_BYTES:
        raise BundleError(
            f"adapter: layout may have {_MAX_LAYOUT_BYTES} bytes, got {len(data)}: an adapter has "
            "some thousands of tensors at most"
        )
    try:
        shapes = _LAYOUT.validate_json(bytes(data))
    except ValidationError:
        raise BundleError(
            "adapter: layout must be a JSON object of each tensor's shape: at most "
            f"{MAX_DIMENSIONS} sizes from 1 to {(1 << 32) - 1}"
        ) from None
    layout = {name: tuple(shape) for name, shape in shapes.items()}
    if not layout:
        raise BundleError("adapter holds no tensors: submit every LoRA tensor of the front")
    return layout
