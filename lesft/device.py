"""Which torch device to compute on, and how precisely."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

from lesft.errors import InvalidInput

Precision = Literal["fp32", "bf16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """With bf16, matrices are multiplied in it, and adapters stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


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
