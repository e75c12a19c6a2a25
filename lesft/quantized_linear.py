"""A frozen linear layer that keeps its weights in 8 or 4 bits and computes with them as floats.

A row of weights is taken 32 values at a time, which share a scale in bfloat16: 8.5 and 4.5 bits a
weight. Weights become floats a block of rows at a time, in the forward pass and again in the
backward pass, so that no whole copy of them exists. Shape letters: N tokens, I inputs, O outputs,
R rows of a block of weights, G groups of a row, K values of a group.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

Bits = Literal[8, 4]
BITS: Mapping[str, Bits] = {"int8": 8, "int4": 4}
"""Bits of a weight by precision, where they are not floats."""
ReadRows = Callable[[int, int], torch.Tensor]
"""Rows `[start:stop]` of a weight matrix in any floating dtype."""

_MOST_IN_GROUP = 32  # fewer where a row is no multiple of it
_BLOCK_WEIGHTS = 1 << 21
"""In a block of rows: 8 MiB of float32, which a processor's cache holds."""


class QuantizedLinear(torch.nn.Linear):
    """Takes the place of a `torch.nn.Linear`; peft puts adapters on it as on that."""

    scales: torch.Tensor

    def __init__(
        self, linear: torch.nn.Linear, read_rows: ReadRows, bits: Bits, device: torch.device
    ) -> None:
        """`linear` gives shape and bias, and may be on the meta device; `read_rows` the weights."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits = bits
        self.register_parameter("bias", linear.bias)
        # Not in the model's state, which is what its files hold.
        for name, (width, dtype) in layout(self.in_features, bits).items():
            empty = torch.empty(self.out_features, width, dtype=dtype, device=device)
            self.register_buffer(name, empty, persistent=False)
        for start, stop in self._spans():
            codes, scales = quantize(read_rows(start, stop).to(device), bits)
            self.weight[start:stop], self.scales[start:stop] = codes, scales

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """As a linear layer does; in autocast's dtype where that is on."""
        device = inputs.device.type
        if torch.is_autocast_enabled(device):
            inputs = inputs.to(torch.get_autocast_dtype(device))
        product: Any = _FrozenProduct.apply
        outputs: torch.Tensor = product(inputs.flatten(0, -2), self)
        if self.bias is not None:
            outputs = outputs + self.bias.to(outputs.dtype)
        return outputs.reshape(*inputs.shape[:-1], self.out_features)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weights `[R, I]` a block of rows at a time, each with its place."""
        for start, stop in self._spans():
            rows = slice(start, stop)
            yield rows, dequantize(self.weight[rows], self.scales[rows], self.bits, dtype)

    def _spans(self) -> Iterator[tuple[int, int]]:
        rows = max(1, _BLOCK_WEIGHTS // self.in_features)
        for start in range(0, self.out_features, rows):
            yield start, min(start + rows, self.out_features)


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ. The gradient of x needs W alone, so nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, input_NI: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        output_NO = input_NI.new_empty(len(input_NI), layer.out_features)
        for rows, weight_RI in layer.blocks(input_NI.dtype):
            output_NO[:, rows] = input_NI @ weight_RI.T
        return output_NO

    @staticmethod
    def backward(ctx: Any, gradient_NO: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer: QuantizedLinear = ctx.layer
        sum_NI = gradient_NO.new_zeros(len(gradient_NO), layer.in_features, dtype=torch.float32)
        for rows, weight_RI in layer.blocks(gradient_NO.dtype):
            sum_NI += gradient_NO[:, rows] @ weight_RI
        return sum_NI.to(gradient_NO.dtype), None


# ---------------------------------------------------------------------- codes and scales


def layout(inputs: int, bits: Bits) -> dict[str, tuple[int, torch.dtype]]:
    """Width of a row and dtype of codes (`weight`) and of `scales`."""
    codes = (inputs, torch.int8) if bits == 8 else (inputs // 2, torch.uint8)
    return {"weight": codes, "scales": (inputs // _group(inputs), torch.bfloat16)}


def quantize(weight_RI: torch.Tensor, bits: Bits) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 `[R, I]` or two to a byte `[R, I/2]`, and scales `[R, G]`.

    The value of a group that is largest in magnitude gets the lowest code, which has no positive
    counterpart: so all 256 or 16 codes are in use.
    """
    lowest = -(1 << bits - 1)
    rows, inputs = weight_RI.shape
    groups_RGK = weight_RI.float().reshape(rows, -1, _group(inputs))
    largest_RG1 = groups_RGK.gather(2, groups_RGK.abs().argmax(2, keepdim=True))
    scales_RG1 = (largest_RG1 / lowest).to(torch.bfloat16)
    divisors_RG1 = torch.where(scales_RG1 == 0, torch.inf, scales_RG1.float())
    codes_RGK = (groups_RGK / divisors_RG1).round_().clamp_(lowest, -lowest - 1)
    codes_RI = codes_RGK.flatten(1).to(torch.int8)
    if bits == 4:
        low, high = (codes_RI + 8).to(torch.uint8).chunk(2, dim=1)
        codes_RI = low | high << 4
    return codes_RI, scales_RG1.squeeze(2)


def dequantize(
    codes: torch.Tensor, scales_RG: torch.Tensor, bits: Bits, dtype: torch.dtype
) -> torch.Tensor:
    """The weights `[R, I]` of codes and scales."""
    if bits == 4:
        weight_RI = torch.cat((codes & 15, codes >> 4), dim=1).to(dtype).sub_(8)
    else:
        weight_RI = codes.to(dtype)
    groups_RGK = weight_RI.reshape(*scales_RG.shape, -1)
    return groups_RGK.mul_(scales_RG.to(dtype).unsqueeze(2)).flatten(1)


def _group(inputs: int) -> int:
    return math.gcd(inputs, _MOST_IN_GROUP)
