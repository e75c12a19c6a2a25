"""Rows of activations or gradients as 8 or 4 bits a value, with scales; deterministic.

A row is taken 64 values at a time. These are first multiplied by a Hadamard matrix, a rotation but
for a factor, which spreads the few channels of large magnitude that activations have over the
others, as in QuaRot (Ashkboos et al. 2024), and then share a scale. docs/decisions/0011 has what
that is worth. Sums and powers of two are all that a rotation takes, in an order of its own: the
same bits come out on any device and in any batch.

Every row is encoded by itself, so that a token costs and means the same in whatever batch it
travels. Quantising what was dequantised gives the same codes and scales again: a scale has
bfloat16's 8 bits, so that code times scale is exact, and the largest code is always in use. What
is kept encoded, on disk or in a ledger, therefore stays what was computed with.
"""

import math
from typing import NamedTuple

import torch

from lesft.errors import InvalidInput

QUANTIZED = frozenset({"int8", "int4"})
"""The encodings that are."""

_MOST_IN_BLOCK = 64
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny
"""Smaller ones have fewer bits; such values are taken for zeros."""


class Part(NamedTuple):
    """Shape and dtype of a tensor as it travels."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def layout(num_rows: int, width: int, encoding: str) -> tuple[Part, Part]:
    """Codes and scales of `[num_rows, width]` values. Raises InvalidInput for int4's odd width."""
    scales = Part((num_rows, width // _block(width)), torch.bfloat16)
    if encoding == "int8":
        return Part((num_rows, width), torch.int8), scales
    if width % 2:
        raise InvalidInput(f"int4 needs an even hidden size, got {width}: choose int8")
    return Part((num_rows, width // 2), torch.uint8), scales


def quantize(values_ND: torch.Tensor, encoding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, as `layout` says, of floating values; on their device."""
    rows, width = values_ND.shape
    layout(rows, width, encoding)
    largest = 127 if encoding == "int8" else 7
    blocks_NBK = _rotated(_in_blocks(values_ND.detach().float()))
    scales_NB = (blocks_NBK.abs().amax(2) / largest).to(torch.bfloat16)
    scales_NB = torch.where(scales_NB < _SMALLEST_SCALE, 0, scales_NB)
    divisors_NB = torch.where(scales_NB == 0, torch.inf, scales_NB.float())
    codes_NBK = (blocks_NBK / divisors_NB.unsqueeze(2)).round_().clamp_(-largest, largest)
    codes_ND = codes_NBK.reshape(rows, width).to(torch.int8)
    if encoding == "int8":
        return codes_ND, scales_NB
    nibbles_ND = (codes_ND + 8).to(torch.uint8)
    return nibbles_ND[:, 0::2] | nibbles_ND[:, 1::2] << 4, scales_NB


def dequantize(codes: torch.Tensor, scales_NB: torch.Tensor, encoding: str) -> torch.Tensor:
    """The float32 values `[N, D]` of codes and scales."""
    if encoding == "int4":
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).to(torch.int8) - 8
    blocks_NBK = _in_blocks(codes) * scales_NB.float().unsqueeze(2)
    return (_rotated(blocks_NBK) / blocks_NBK.shape[2]).reshape(codes.shape)


def _in_blocks(values_ND: torch.Tensor) -> torch.Tensor:
    rows, width = values_ND.shape
    return values_ND.reshape(rows, width // _block(width), _block(width))


def _block(width: int) -> int:
    """How many values share a scale: the largest power of two up to 64 that divides a row."""
    return math.gcd(width, _MOST_IN_BLOCK)


def _rotated(blocks_NBK: torch.Tensor) -> torch.Tensor:
    """Each block times the matrix of Sylvester's construction; twice is the block K times."""
    rows, blocks, size = blocks_NBK.shape
    half = 1
    while half < size:
        pairs = blocks_NBK.reshape(rows, blocks, size // (2 * half), 2, half)
        one, other = pairs.unbind(3)
        blocks_NBK = torch.stack((one + other, one - other), dim=3)
        half *= 2
    return blocks_NBK.reshape(rows, blocks, size)
