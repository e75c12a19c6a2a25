"""Named torch tensors to and from a bundle's bytes (safetensors), checked on the way in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load, save

from lesft.bundle import tensor_views
from lesft.entropy import deflate, inflate
from lesft.errors import BundleError
from lesft.quantization import QUANTIZED, Part, dequantize, layout, quantize
from lesft.spec import Encoding

HEADER_BYTES = 4096
"""Room for a bundle's own header beside its tensors, for limits on a bundle's size."""

_ENTRY_BYTES = 256
"""Room for one tensor's entry in that header."""

_WIRE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    # Those below never travel; they are here to be refused by their name.
    "F64": torch.float64,
    "F16": torch.float16,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of a bundle must be; a shape of one length -1 stands for any length."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def num_values(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def encode_tensors(tensors: Mapping[str, torch.Tensor], encoding: Encoding) -> bytes:
    """A bundle of tensors from any device; floating ones `[N, D]` are written as the encoding says.

    Quantised ones are their codes' DEFLATE stream, with the scales beside it, under their name and
    `.scale`.
    """
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if encoding in QUANTIZED and tensor.is_floating_point():
            codes, parts[_scale(name)] = quantize(tensor, encoding)
            parts[name] = _deflated(codes)
        elif encoding == "bf16" and tensor.is_floating_point():
            parts[name] = tensor.to(torch.bfloat16)
        else:
            parts[name] = tensor
    return save({name: part.detach().to("cpu").contiguous() for name, part in parts.items()})


def _scale(name: str) -> str:
    return f"{name}.scale"


def _deflated(codes: torch.Tensor) -> torch.Tensor:
    stream = deflate(codes.to("cpu").contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def _inflated(name: str, stream: torch.Tensor, codes: Part) -> torch.Tensor:
    data = inflate(f"tensor {name!r}", stream.numpy().tobytes(), codes.num_bytes)
    return torch.frombuffer(bytearray(data), dtype=codes.dtype).reshape(codes.shape)


def encoded_bytes(num_rows: int, width: int, encoding: Encoding, itemsize: int = 4) -> int:
    """Size in a bundle of `[num_rows, width]` values that take `itemsize` bytes each in memory.

    Of quantised ones, the most: before their codes are deflated.
    """
    if encoding in QUANTIZED:
        return sum(part.num_bytes for part in layout(num_rows, width, encoding))
    return num_rows * width * (torch.bfloat16.itemsize if encoding == "bf16" else itemsize)


def decode_encoded(
    data: bytes,
    shapes: Mapping[str, tuple[int, int]],
    encoding: Encoding,
    others: Mapping[str, TensorSpec] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """Floating tensors of these shapes that travelled under an encoding, and others that are plain.

    On the CPU; float32, or bfloat16 where that travelled. Raises BundleError as `decode_tensors`.
    """
    if encoding not in QUANTIZED:
        dtypes = encoded_dtypes(encoding)
        plain = {name: TensorSpec(shape, dtypes) for name, shape in shapes.items()}
        return decode_tensors(data, {**others, **plain})
    expected = dict(others)
    for name, shape in shapes.items():
        _, scales = layout(*shape, encoding)
        expected[name] = _STREAM
        expected[_scale(name)] = TensorSpec(scales.shape, (scales.dtype,))
    parts = decode_tensors(data, expected)
    tensors = {name: parts[name] for name in others}
    for name, shape in shapes.items():
        codes = _inflated(name, parts[name], layout(*shape, encoding)[0])
        tensors[name] = dequantize(codes, parts[_scale(name)], encoding)
        _check_finite(name, tensors[name])  # a scale may be finite and the values not
    return tensors


_STREAM = TensorSpec((-1,), (torch.uint8,))


def load_encoded(data: bytes, encoding: Encoding, width: int) -> dict[str, torch.Tensor]:
    """What `encode_tensors` has written of rows `[N, width]`, of bytes that stayed in our hands."""
    parts = load(data)
    shapes = {n: (len(parts[_scale(n)]), width) for n in parts if _scale(n) in parts}
    names = parts.keys() - shapes.keys() - {_scale(name) for name in shapes}
    others = {n: TensorSpec(tuple(parts[n].shape), (parts[n].dtype,)) for n in names}
    return decode_encoded(data, shapes, encoding, others)


def encoded_dtypes(encoding: Encoding) -> tuple[torch.dtype, ...]:
    """The dtypes that activations or gradients may have where they travel as floating numbers."""
    return (torch.bfloat16,) if encoding == "bf16" else (torch.float32, torch.bfloat16)


def decode_tensors(data: bytes, expected: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """The tensors of a bundle, on the CPU, in their wire dtype.

    Raises BundleError unless the bundle holds exactly the expected names with an expected dtype
    and shape, and only finite numbers.
    """
    views = tensor_views("bundle", data, HEADER_BYTES + _ENTRY_BYTES * len(expected))
    _check_names(views, expected)
    # Nothing becomes a tensor before its dtype and shape are known to be as expected.
    tensors = {name: _decoded(name, views[name], spec) for name, spec in expected.items()}
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    return tensors


def _decoded(name: str, view: Mapping[str, Any], spec: TensorSpec) -> torch.Tensor:
    dtype = _WIRE_DTYPES.get(view["dtype"], view["dtype"])
    _check_kind(name, dtype, view["shape"], spec)
    if not view["data"]:
        return torch.empty(view["shape"], dtype=dtype)
    return torch.frombuffer(view["data"], dtype=dtype).reshape(view["shape"])


def check_tensors(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, TensorSpec]) -> None:
    """Raises BundleError unless names, dtypes and shapes are as expected and all is finite."""
    _check_names(tensors, expected)
    for name, spec in expected.items():
        _check_kind(name, tensors[name].dtype, tensors[name].shape, spec)
        _check_finite(name, tensors[name])


def _check_names(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if found.keys() != expected.keys():
        names = sorted(found.keys() ^ expected.keys())
        raise BundleError(
            f"{len(expected)} tensors expected, got {len(found)}; "
            f"{'missing' if names[0] in expected else 'not expected'}: {names[0]!r}"
        )


def _check_kind(
    name: str, dtype: torch.dtype | str, shape: Sequence[int], spec: TensorSpec
) -> None:
    if dtype not in spec.dtypes:
        allowed = " or ".join(map(str, spec.dtypes))
        raise BundleError(f"tensor {name!r} must be {allowed}, got {dtype}")
    if tuple(shape) != spec.shape and not (spec.shape == (-1,) and len(shape) == 1):
        raise BundleError(f"tensor {name!r} must have shape {list(spec.shape)}, got {list(shape)}")


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise BundleError(f"tensor {name!r} has values that are NaN or infinite")
