"""Which torch device to compute on."""

import torch

from lesft.errors import InvalidInput


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
