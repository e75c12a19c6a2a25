"""Named torch tensors to and from a bundle's bytes (safetensors), checked on the way in."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lesft.errors import BundleError
from lesft.spec import Encoding

HEADER_BYTES = 4096
"""Room for a bundle's own header beside its tensors, for limits on a bundle's size."""


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of a bundle must be."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def encoded_dtypes(encoding: Encoding) -> tuple[torch.dtype, ...]:
    """The dtypes that activations or gradients may have under an encoding."""
    return (torch.bfloat16,) if encoding == "bf16" else (torch.float32, torch.bfloat16)


def encode_tensors(tensors: Mapping[str, torch.Tensor], encoding: Encoding) -> bytes:
    """A bundle of tensors from any device; floating ones are rounded as the encoding says."""
    return save({name: _encoded(tensor, encoding) for name, tensor in tensors.items()})


def _encoded(tensor: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    if encoding == "bf16" and tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16)
    return tensor.detach().to("cpu").contiguous()


def decode_tensors(data: bytes, expected: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """The tensors of a bundle, on the CPU, in their wire dtype.

    Raises BundleError unless the bundle holds exactly the expected names with an expected dtype
    and shape, and only finite numbers.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"bundle is no safetensors byte string: {error}") from None
    check_tensors(tensors, expected)
    return tensors


def check_tensors(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, TensorSpec]) -> None:
    """Raises BundleError unless names, dtypes and shapes are as expected and all is finite."""
    if tensors.keys() != expected.keys():
        names = sorted(tensors.keys() ^ expected.keys())
        raise BundleError(
            f"{len(expected)} tensors expected, got {len(tensors)}; "
            f"{'missing' if names[0] in expected else 'not expected'}: {names[0]!r}"
        )
    for name, spec in expected.items():
        _check_tensor(name, tensors[name], spec)


def _check_tensor(name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
    if tensor.dtype not in spec.dtypes:
        allowed = " or ".join(map(str, spec.dtypes))
        raise BundleError(f"tensor {name!r} must be {allowed}, got {tensor.dtype}")
    if tuple(tensor.shape) != spec.shape:
        raise BundleError(
            f"tensor {name!r} must have shape {list(spec.shape)}, got {list(tensor.shape)}"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise BundleError(f"tensor {name!r} has values that are NaN or infinite")
