"""A frozen linear layer in 8 or 4 bits: codes and scales, product and gradient."""

import pytest
import torch

from lesft import quantized_linear
from lesft.quantized_linear import Bits, QuantizedLinear, dequantize, quantize

CPU = torch.device("cpu")
both_widths = pytest.mark.parametrize("bits", [8, 4])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight_RI: torch.Tensor, bits: Bits, bias: torch.Tensor | None) -> QuantizedLinear:
    outputs, inputs = weight_RI.shape
    linear = torch.nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer = QuantizedLinear(linear, lambda start, stop: weight_RI[start:stop], bits, CPU)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


@both_widths
def test_a_weight_is_off_by_half_a_step_at_most_and_by_a_whole_one_at_the_far_end(
    bits: Bits,
) -> None:
    """The far end: as large as the group's largest, but of the other sign, which has one code less.

    A little more, since a scale is rounded to bfloat16.
    """
    weight_RI = random(50, 96)
    codes, scales_RG = quantize(weight_RI, bits)
    found_RI = dequantize(codes, scales_RG, bits, torch.float32)
    steps = ((found_RI - weight_RI).reshape(50, 3, 32) / scales_RG.float().unsqueeze(2)).abs()
    assert steps.max() <= 1 + 2**-8 * 2 ** (bits - 1)
    assert (steps <= 0.5 + 1e-3).float().mean() > 0.95
    assert codes.numel() * 8 == bits * weight_RI.numel()


@both_widths
def test_codes_times_scale_come_back_to_the_last_bit(bits: Bits) -> None:
    lowest = -(2 ** (bits - 1))
    codes_RI = torch.randint(lowest, -lowest, (7, 64), generator=torch.Generator().manual_seed(1))
    codes_RI[:, ::32] = lowest
    weight_RI = codes_RI * torch.tensor([2.0**-6]).repeat_interleave(64)
    found = dequantize(*quantize(weight_RI.bfloat16(), bits), bits, torch.float32)
    assert torch.equal(found, weight_RI)


@both_widths
@pytest.mark.parametrize("inputs", [32, 48, 6])
def test_zeros_stay_zeros_beside_other_groups_of_any_size(bits: Bits, inputs: int) -> None:
    weight_RI = random(4, inputs)
    weight_RI[2] = 0
    found = dequantize(*quantize(weight_RI, bits), bits, torch.float32)
    assert torch.equal(found[2], weight_RI[2])
    assert torch.allclose(found, weight_RI, atol=2.0 ** (4 - bits))


@both_widths
@pytest.mark.parametrize("with_bias", [True, False])
def test_product_and_gradient_are_those_of_the_dequantised_weights(
    monkeypatch: pytest.MonkeyPatch, bits: Bits, with_bias: bool
) -> None:
    monkeypatch.setattr(quantized_linear, "_BLOCK_WEIGHTS", 64 * 7)  # the last block is smaller
    weight_OI, bias = random(40, 64), random(40, seed=2) if with_bias else None
    layer = layer_of(weight_OI, bits, bias)
    whole_OI = dequantize(*quantize(weight_OI, bits), bits, torch.float32)
    inputs, gradient = random(2, 5, 64, seed=3), random(2, 5, 40, seed=4)
    found, expected = (inputs.clone().requires_grad_() for _ in range(2))
    outputs = layer(found)
    outputs.backward(gradient)
    plain = torch.nn.functional.linear(expected, whole_OI, bias)
    plain.backward(gradient)
    assert torch.allclose(outputs, plain, atol=1e-5)
    assert found.grad is not None
    assert expected.grad is not None
    assert torch.allclose(found.grad, expected.grad, atol=1e-5)


def test_nothing_is_kept_for_the_backward_pass() -> None:
    layer, kept = layer_of(random(40, 64), 8, None), []
    inputs = random(5, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda packed: packed):
        layer(inputs)
    assert kept == []


def test_autocast_multiplies_in_its_dtype() -> None:
    layer, inputs = layer_of(random(40, 64), 8, random(40)), random(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    assert layer(inputs).dtype == torch.float32
