"""8 and 4 bits a value: how far off, how many bytes, and the same bits wherever they are made."""

import pytest
import torch

from lesft.entropy import deflate
from lesft.errors import BundleError, InvalidInput
from lesft.quantization import dequantize, layout, quantize
from lesft.spec import Encoding
from lesft.tensors import (
    TensorSpec,
    decode_encoded,
    decode_tensors,
    encode_tensors,
    encoded_bytes,
    load_encoded,
)
from lesft.wire import bundle_parts

WIDTHS = (576, 2048, 96, 6, 2)


def activations(width: int, rows: int = 40) -> torch.Tensor:
    """With one channel far larger than the others, as a decoder's are, and a few odd rows."""
    generator = torch.Generator().manual_seed(width)
    values_ND = torch.randn(rows, width, generator=generator)
    values_ND[:, width // 3] *= 30
    values_ND[0] = 0
    values_ND[1] *= 1e-42
    values_ND[2] *= 1e30
    values_ND[3] = 1
    return values_ND


def there_and_back(values_ND: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    return dequantize(*quantize(values_ND, encoding), encoding)


def error(values_ND: torch.Tensor, encoding: Encoding) -> float:
    """Relative, by the norms of all rows but the odd ones."""
    back_ND = there_and_back(values_ND, encoding)[4:]
    return float((back_ND - values_ND[4:]).norm() / values_ND[4:].norm())


@pytest.mark.parametrize("width", [576, 2048])
def test_values_come_back_nearly_as_they_were(width: int) -> None:
    values_ND = activations(width)
    assert error(values_ND, "int8") < 0.006
    assert error(values_ND, "int4") < 0.1


def test_a_large_channel_costs_the_others_little() -> None:
    """Without the rotation the others' error would be the large one's over 7, or 127."""
    values_ND = activations(576)[4:]
    plain_N1 = values_ND.abs().amax(1, keepdim=True) / 127
    plain_ND = (values_ND / plain_N1).round() * plain_N1
    off = float((there_and_back(values_ND, "int8") - values_ND).norm())
    assert off < 0.25 * float((plain_ND - values_ND).norm())


@pytest.mark.parametrize("encoding", ["int8", "int4"])
@pytest.mark.parametrize("width", WIDTHS)
def test_what_was_quantised_once_stays_as_it_is_bit_for_bit(width: int, encoding: Encoding) -> None:
    first_ND = there_and_back(activations(width), encoding)
    assert torch.equal(there_and_back(first_ND, encoding), first_ND)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_a_row_is_the_same_in_any_batch(encoding: Encoding) -> None:
    values_ND = activations(576, rows=300)
    whole_ND = there_and_back(values_ND, encoding)
    for row in (4, 17, 299):
        assert torch.equal(there_and_back(values_ND[row : row + 1], encoding)[0], whole_ND[row])


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_zeros_stay_zeros_and_no_rows_are_no_rows(encoding: Encoding) -> None:
    assert there_and_back(torch.zeros(2, 64), encoding).tolist() == torch.zeros(2, 64).tolist()
    assert there_and_back(torch.empty(0, 64), encoding).shape == (0, 64)


def test_int8_by_hand() -> None:
    """[3, 1] times [[1, 1], [1, -1]] is [4, 2]."""
    codes, scales = quantize(torch.tensor([[3.0, 1.0]]), "int8")
    scale = torch.tensor(4 / 127).bfloat16()
    assert scales.tolist() == [[float(scale)]]
    assert codes.tolist() == [[127, round(2 / float(scale))]]
    rotated = [127 * float(scale), codes[0, 1].item() * float(scale)]
    expected = [(rotated[0] + rotated[1]) / 2, (rotated[0] - rotated[1]) / 2]
    assert dequantize(codes, scales, "int8").tolist() == [pytest.approx(expected, rel=1e-6)]


def test_int4_by_hand() -> None:
    """[-5, 9] becomes [4, -14]: at a scale of 2 the codes 2 and -7, with 8 added 10 and 1."""
    codes, scales = quantize(torch.tensor([[-5.0, 9.0]]), "int4")
    assert scales.tolist() == [[2.0]]
    assert codes.tolist() == [[10 | 1 << 4]]
    assert dequantize(codes, scales, "int4").tolist() == [[-5.0, 9.0]]


@pytest.mark.parametrize(("encoding", "bytes_a_row"), [("int8", 576 + 18), ("int4", 288 + 18)])
def test_bytes_are_those_of_the_layout_and_of_the_bundle(
    encoding: Encoding, bytes_a_row: int
) -> None:
    values_ND = activations(576)
    codes, scales = quantize(values_ND, encoding)
    parts = layout(40, 576, encoding)
    assert [(part.shape, part.dtype) for part in parts] == [
        (codes.shape, codes.dtype),
        (scales.shape, scales.dtype),
    ]
    assert sum(part.num_bytes for part in parts) == 40 * bytes_a_row
    assert encoded_bytes(40, 576, encoding) == 40 * bytes_a_row
    data = encode_tensors({"base": values_ND}, encoding)
    assert 0.8 * 40 * bytes_a_row < len(data) < 40 * bytes_a_row
    assert (
        len(data) == 8 + int.from_bytes(data[:8], "little") + bundle_parts(data)["activations_base"]
    )


@pytest.mark.parametrize(("encoding", "bits"), [("int8", 8.05), ("int4", 3.9)])
def test_codes_take_the_bits_that_they_tell(encoding: Encoding, bits: float) -> None:
    """With their scales, a quarter of a bit for each value."""
    data = encode_tensors({"base": activations(576, rows=300)[4:]}, encoding)
    assert bits - 0.3 < len(data) * 8 / (296 * 576) < bits


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_a_bundle_holds_codes_and_scales_and_comes_back_as_values(encoding: Encoding) -> None:
    values_ND, ids_T = activations(64), torch.tensor([3, 1], dtype=torch.int32)
    data = encode_tensors({"base": values_ND, "targets": ids_T}, encoding)
    others = {"targets": TensorSpec((2,), (torch.int32,))}
    decoded = decode_encoded(data, {"base": (40, 64)}, encoding, others)
    assert decoded.keys() == {"base", "targets"}
    assert torch.equal(decoded["base"], there_and_back(values_ND, encoding))
    assert decoded["targets"].tolist() == [3, 1]
    loaded = load_encoded(data, encoding, 64)
    assert loaded.keys() == decoded.keys()
    assert torch.equal(loaded["base"], decoded["base"])


def test_another_encoding_than_the_one_agreed_on_is_refused() -> None:
    values_ND = activations(64)
    raw, int8 = (
        encode_tensors({"base": values_ND}, "raw"),
        encode_tensors({"base": values_ND}, "int8"),
    )
    with pytest.raises(BundleError, match=r"missing: 'base\.scale'"):
        decode_encoded(raw, {"base": (40, 64)}, "int8")
    with pytest.raises(BundleError, match=r"not expected: 'base\.scale'"):
        decode_encoded(int8, {"base": (40, 64)}, "raw")
    with pytest.raises(
        BundleError, match=r"tensor 'base' must be one DEFLATE stream of 1280 bytes"
    ):
        decode_encoded(int8, {"base": (40, 64)}, "int4")


def test_scales_that_are_no_numbers_are_refused() -> None:
    values_ND = activations(64)
    values_ND[5, 5] = float("inf")
    data = encode_tensors({"base": values_ND}, "int8")
    with pytest.raises(BundleError, match=r"'base\.scale' has values that are NaN or infinite"):
        decode_encoded(data, {"base": (40, 64)}, "int8")


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_finite_scales_of_values_that_are_not_are_refused(encoding: Encoding) -> None:
    """Infinities of both signs would meet as NaN, which is larger than nothing."""
    codes, scales = (part.clone() for part in quantize(activations(64)[4:6], encoding))
    scales[0] = torch.finfo(torch.bfloat16).max
    stream = torch.frombuffer(bytearray(deflate(codes.numpy().tobytes())), dtype=torch.uint8)
    data = encode_tensors({"base": stream, "base.scale": scales}, "raw")
    with pytest.raises(BundleError, match=r"tensor 'base' has values that are NaN or infinite"):
        decode_encoded(data, {"base": (2, 64)}, encoding)


def test_int4_of_an_odd_width_is_refused() -> None:
    message = "int4 needs an even hidden size, got 7: choose int8"
    with pytest.raises(InvalidInput, match=f"^{message}$"):
        quantize(torch.zeros(1, 7), "int4")
    assert quantize(torch.ones(1, 7), "int8")[0].tolist() == [[127] * 7]


def test_plain_tensors_of_these_dtypes_are_told_apart_by_name() -> None:
    codes = {"a": torch.tensor([[1, 2]], dtype=torch.int8)}
    spec = {"a": TensorSpec((1, 2), (torch.int8,))}
    assert decode_tensors(encode_tensors(codes, "raw"), spec)["a"].tolist() == [[1, 2]]
