"""Adapters on their way to and from the aggregator: whole, or as what has changed since a version.

A step of AdamW changes every value by about the learning rate, so the change since the last average
takes few bits: 8 or 4 a value, with a scale for each 256, all tensors of an adapter one after the
other. Unlike activations, changes have no few channels of great magnitude, and need no rotation.

Both ends compute `base + change` with the same numpy operations on the same values, so that both
have the same adapter afterwards, to the last bit. Version 0, which nobody has averaged, is known to
the clients alone: what is based on it travels whole, in 8 bits. Loads no torch.
"""

import json
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from pydantic import PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from lesft.bundle import check_header
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
_LAYOUT = TypeAdapter(dict[str, tuple[PositiveInt, ...]])


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
    """Before codes are deflated, without names and shapes; of what has a base."""
    bits = {"raw": 32.0, "int8": 8 + 32 / _BLOCK, "int4": 4 + 32 / _BLOCK}
    return bits[encoding] / 8


def decode(
    data: bytes, encoding: AdapterEncoding, base: Mapping[str, FloatArray], max_bytes: int
) -> dict[str, FloatArray]:
    """The adapter of a bundle from `encode`; no other memory is taken than for `max_bytes` of it.

    Values may be infinite or NaN, which is for the caller to check. Raises BundleError when it is
    none for this base, TooLarge.
    """
    tensors = _read(data, {"codes": "U8", "scales": "F32"} | ({} if base else {"layout": "U8"}))
    layout: Layout
    if base:
        layout = {name: array.shape for name, array in base.items()}
    else:
        encoding, layout = _WHOLE, _read_layout(tensors["layout"])
    num_values = sum(math.prod(shape) for shape in layout.values())
    if num_values * 4 > max_bytes:
        raise TooLarge(
            f"adapter of {num_values * 4} bytes once it is decoded, but at most {max_bytes} are "
            "accepted"
        )
    scales_K = np.frombuffer(tensors["scales"], dtype="<f4")
    if len(scales_K) != math.ceil(num_values / _BLOCK):
        raise BundleError(
            f"adapter: scales must be {math.ceil(num_values / _BLOCK)} for {num_values} values, "
            f"got {len(scales_K)}"
        )
    num_codes = len(scales_K) * _BLOCK
    num_bytes = num_codes if encoding == "int8" else num_codes // 2
    packed = inflate("adapter: codes", bytes(tensors["codes"]), num_bytes)
    with np.errstate(over="ignore", invalid="ignore"):
        values_N = (_unpacked(packed, encoding) * scales_K[:, None]).reshape(-1)[:num_values]
        if base:
            values_N += _flat(base)
    return _shaped(values_N, layout)


# ---------------------------------------------------------------------- values


def _flat(adapter: Mapping[str, FloatArray]) -> FloatArray:
    return np.concatenate([adapter[name].reshape(-1) for name in sorted(adapter)])


def _shaped(values_N: FloatArray, layout: Layout) -> dict[str, FloatArray]:
    adapter, start = dict[str, FloatArray](), 0
    for name in sorted(layout):
        stop = start + math.prod(layout[name])
        adapter[name] = values_N[start:stop].reshape(layout[name])
        start = stop
    return adapter


def _quantized(values_N: FloatArray, largest: int) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Codes `[K, 256]`, the last ones of them for nothing, and scales `[K]`."""
    blocks_KB = np.zeros((math.ceil(len(values_N) / _BLOCK), _BLOCK), np.float32)
    blocks_KB.reshape(-1)[: len(values_N)] = values_N
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
    check_header("adapter", data, _MAX_HEADER_BYTES)
    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise BundleError(f"adapter is no safetensors byte string: {error}") from None
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
        layout = _LAYOUT.validate_json(bytes(data))
    except ValidationError as error:
        raise BundleError(
            f"adapter: layout must give each tensor's shape: {error.errors()[0]['msg']}"
        ) from None
    if not layout:
        raise BundleError("adapter holds no tensors: submit every LoRA tensor of the front")
    return layout
