"""Which torch device to compute on, and how precisely."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from typing import Literal

import torch

from lesft.errors import InvalidInput

Precision = Literal["fp32", "bf16", "int8", "int4"]
"""Of frozen weights; with int8 and int4 those of linear layers, see `lesft.quantized_linear`."""


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype to compute in, and that of weights which are floats.

    int8 and int4 compute in bfloat16, but for a CPU that cannot multiply it: there it is slower.
    """
    if precision == "fp32":
        return torch.float32
    if precision != "bf16" and device.type == "cpu" and not _cpu_multiplies_bfloat16():
        return torch.float32
    return torch.bfloat16


def _cpu_multiplies_bfloat16() -> bool:
    able: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has none
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Where bfloat16 is computed in, matrices are multiplied in it; adapters stay in float32."""
    enabled = compute_dtype(precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def joined(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The rows of tensors one after another, on a device.

    A GPU fetches those of the CPU from pinned memory while this thread goes on.
    """
    if device.type != "cuda" or any(tensor.device.type != "cpu" for tensor in tensors):
        return torch.cat(list(tensors)).to(device)
    shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    pinned = torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.cat(list(tensors), out=pinned).to(device, non_blocking=True)


def choose_device(name: str) -> torch.device:
    """The torch device of a setting; `auto` is CUDA when there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"--device must be auto or a torch device, got {name!r}") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InvalidInput(
            f"--device {name}: torch cannot use it here ({reason}); use --device cpu"
        ) from None
    return device
