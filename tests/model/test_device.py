"""Which device a setting means, and which it cannot."""

import pytest
import torch

from lesft import device as device_module
from lesft.device import Precision, choose_device, compute_dtype, joined
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


@pytest.mark.parametrize(
    ("precision", "device", "cpu_is_able", "dtype"),
    [
        ("fp32", "cuda", True, torch.float32),
        ("bf16", "cpu", False, torch.bfloat16),
        ("int8", "cpu", False, torch.float32),
        ("int8", "cpu", True, torch.bfloat16),
        ("int4", "cuda", False, torch.bfloat16),
    ],
)
def test_quantised_weights_are_computed_with_in_bfloat16_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    device: str,
    cpu_is_able: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(device_module, "_cpu_multiplies_bfloat16", lambda: cpu_is_able)
    assert compute_dtype(precision, torch.device(device)) == dtype


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
        ),
    ],
)
def test_rows_are_joined_on_the_device_in_the_dtype_that_holds_all(device: str) -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    found = joined([rows[:1].bfloat16(), rows[1:1], rows[1:]], torch.device(device))
    assert found.device.type == device
    assert found.dtype == torch.float32
    assert torch.equal(found.cpu(), rows)
