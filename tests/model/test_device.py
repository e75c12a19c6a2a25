"""Which device a setting means, and which it cannot."""

import pytest
import torch

from lesft.device import choose_device
from lesft.errors import InvalidInput


def test_auto_takes_cuda_when_there_is_one_and_else_the_cpu() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto") == torch.device(expected)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(
        InvalidInput, match=f"^--device must be auto or a torch device, got '{name}'$"
    ):
        choose_device(name)


def test_a_device_that_can_hold_no_numbers_is_refused_with_torchs_reason() -> None:
    with pytest.raises(
        InvalidInput, match=r"^--device meta: torch cannot use it here \(.*\); use --device cpu$"
    ):
        choose_device("meta")
