"""Tensors in bundles: exact on the way through, and hostile until checked on the way in."""

import json
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from lesft.errors import BundleError
from lesft.tensors import (
    TensorSpec,
    check_tensors,
    decode_tensors,
    encode_tensors,
    encoded_dtypes,
)

FLOATS = (torch.float32, torch.bfloat16)
EXPECTED = {"base": TensorSpec((3, 4), FLOATS), "targets": TensorSpec((5,), (torch.int32,))}


def right_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "base": torch.randn(3, 4, generator=generator),
        "targets": torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32),
    }


def refused(data: bytes) -> str:
    """The message with which a bundle is refused."""
    with pytest.raises(BundleError) as caught:
        decode_tensors(data, EXPECTED)
    return str(caught.value)


# ---------------------------------------------------------------------- round trip

EXTREMES = [0.0, -0.0, 1.0, -1 / 3, 1.4e-45, -1.1754944e-38, 3.4028235e38, -3.4028235e38, 1e-8]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers, so that -0.0 is not 0.0."""
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def test_raw_numbers_come_back_bit_for_bit() -> None:
    tensors = {"base": torch.tensor(EXTREMES), "half": torch.tensor(EXTREMES).bfloat16()[:5]}
    expected = {"base": TensorSpec((9,), FLOATS), "half": TensorSpec((5,), FLOATS)}
    decoded = decode_tensors(encode_tensors(tensors, "raw"), expected)
    assert list(decoded) == ["base", "half"]
    for name, tensor in tensors.items():
        assert decoded[name].dtype == tensor.dtype
        assert torch.equal(bits(decoded[name]), bits(tensor))


def test_bf16_rounds_floats_to_the_nearest_and_leaves_integers_alone() -> None:
    tensors = {"base": torch.tensor([1 + 2**-8, 1 + 2**-7, 1 + 3 * 2**-8, -2e-40])}
    tensors["targets"] = torch.tensor([70_001, -3], dtype=torch.int32)
    expected = {
        "base": TensorSpec((4,), encoded_dtypes("bf16")),
        "targets": TensorSpec((2,), (torch.int32,)),
    }
    decoded = decode_tensors(encode_tensors(tensors, "bf16"), expected)
    assert decoded["base"].dtype == torch.bfloat16
    # To the even neighbour where two are as near: IEEE 754's default.
    assert decoded["base"][:3].tolist() == [1.0, 1 + 2**-7, 1 + 2 * 2**-7]
    assert torch.equal(bits(decoded["base"]), bits(tensors["base"].bfloat16()))
    assert decoded["targets"].tolist() == [70_001, -3]
    assert len(encode_tensors(tensors, "raw")) - len(encode_tensors(tensors, "bf16")) == 8


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40),
    columns=st.integers(1, 4),
)
def test_any_finite_numbers_of_any_shape_come_back(values: list[float], columns: int) -> None:
    rows = len(values) // columns
    tensor = torch.tensor(values[: rows * columns]).reshape(rows, columns)
    spec = {"base": TensorSpec((rows, columns), FLOATS)}
    decoded = decode_tensors(encode_tensors({"base": tensor}, "raw"), spec)["base"]
    assert decoded.shape == (rows, columns)
    assert torch.equal(bits(decoded), bits(tensor))


def test_a_tensor_with_gradient_or_strides_is_sent_as_its_plain_numbers() -> None:
    tensor = torch.arange(12.0).reshape(4, 3).T.requires_grad_()
    decoded = decode_tensors(
        encode_tensors({"base": tensor}, "raw"), {"base": TensorSpec((3, 4), FLOATS)}
    )["base"]
    assert decoded.tolist() == tensor.tolist()
    assert not decoded.requires_grad


def test_the_bytes_are_plain_safetensors() -> None:
    tensors = right_tensors()
    loaded = load(encode_tensors(tensors, "raw"))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_encodings_allow_their_dtypes() -> None:
    assert encoded_dtypes("raw") == (torch.float32, torch.bfloat16)
    assert encoded_dtypes("bf16") == (torch.bfloat16,)


# ---------------------------------------------------------------------- wrong tensors


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The right tensors, some replaced, some (None) left out."""
    every = {**right_tensors(), **tensors}
    return {name: tensor for name, tensor in every.items() if tensor is not None}


def with_value(value: float) -> torch.Tensor:
    tensor = right_tensors()["base"]
    tensor[2, 3] = value
    return tensor


NOT_FINITE = "tensor 'base' has values that are NaN or infinite"
WRONG: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "one is missing": (
        changed(targets=None),
        "2 tensors expected, got 1; missing: 'targets'",
    ),
    "one is not expected": (
        changed(secret=torch.zeros(1)),
        "2 tensors expected, got 3; not expected: 'secret'",
    ),
    "one has another name": (
        changed(base=None, bases=torch.zeros(3, 4)),
        "2 tensors expected, got 2; missing: 'base'",
    ),
    "none is there": (
        changed(base=None, targets=None),
        "2 tensors expected, got 0; missing: 'base'",
    ),
    "float64": (
        changed(base=torch.zeros(3, 4, dtype=torch.float64)),
        "tensor 'base' must be torch.float32 or torch.bfloat16, got torch.float64",
    ),
    "float16": (
        changed(base=torch.zeros(3, 4, dtype=torch.float16)),
        "tensor 'base' must be torch.float32 or torch.bfloat16, got torch.float16",
    ),
    "integers for floats": (
        changed(base=torch.zeros(3, 4, dtype=torch.int32)),
        "tensor 'base' must be torch.float32 or torch.bfloat16, got torch.int32",
    ),
    "floats for integers": (
        changed(targets=torch.zeros(5)),
        "tensor 'targets' must be torch.int32, got torch.float32",
    ),
    "int64": (
        changed(targets=torch.zeros(5, dtype=torch.int64)),
        "tensor 'targets' must be torch.int32, got torch.int64",
    ),
    "a row too many": (
        changed(base=torch.zeros(4, 4)),
        "tensor 'base' must have shape [3, 4], got [4, 4]",
    ),
    "the same numbers in another shape": (
        changed(base=torch.zeros(4, 3)),
        "tensor 'base' must have shape [3, 4], got [4, 3]",
    ),
    "a dimension too many": (
        changed(base=torch.zeros(1, 3, 4)),
        "tensor 'base' must have shape [3, 4], got [1, 3, 4]",
    ),
    "no dimension": (
        changed(base=torch.tensor(1.0)),
        "tensor 'base' must have shape [3, 4], got []",
    ),
    "no numbers": (
        changed(targets=torch.zeros(0, dtype=torch.int32)),
        "tensor 'targets' must have shape [5], got [0]",
    ),
    "NaN": (changed(base=with_value(float("nan"))), NOT_FINITE),
    "infinity": (changed(base=with_value(float("inf"))), NOT_FINITE),
    "minus infinity in bfloat16": (changed(base=with_value(float("-inf")).bfloat16()), NOT_FINITE),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tensors_are_refused_on_the_way_in_and_in_memory(what: str) -> None:
    tensors, message = WRONG[what]
    assert refused(encode_tensors(tensors, "raw")) == message
    with pytest.raises(BundleError) as caught:
        check_tensors(tensors, EXPECTED)
    assert str(caught.value) == message


def test_right_tensors_pass_the_check() -> None:
    check_tensors(right_tensors(), EXPECTED)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U16", "BOOL", "C64"])
def test_a_dtype_that_never_travels_is_named_as_the_file_names_it(dtype: str) -> None:
    size = 12 * {"C64": 8, "U16": 2}.get(dtype, 1)
    data = lying({"base": entry(dtype, [3, 4], 0, size), "targets": targets_after(size)}, size + 20)
    assert refused(data) == (f"tensor 'base' must be torch.float32 or torch.bfloat16, got {dtype}")


# ---------------------------------------------------------------------- headers that lie


def entry(dtype: str, shape: list[Any], start: Any, stop: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def targets_after(start: int) -> dict[str, Any]:
    return entry("I32", [5], start, start + 20)


def lying(header: Any, num_bytes: int) -> bytes:
    """A safetensors byte string with whatever header over `num_bytes` zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


BASE, TARGETS = entry("F32", [3, 4], 0, 48), entry("I32", [5], 48, 68)
RIGHT_HEADER = {"base": BASE, "targets": TARGETS}
TEXT = json.dumps(RIGHT_HEADER).encode()

LIES: dict[str, bytes] = {
    "nothing": b"",
    "less than a header's length": bytes(7),
    "no header": bytes(8),
    "zeros": bytes(1000),
    "text": b"What is this? It is no safetensors byte string, that much is certain.",
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00]\x94(K\x01K\x02e.",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + TEXT + bytes(68),
    "a header of 2^64 - 1 bytes": (2**64 - 1).to_bytes(8, "little") + TEXT + bytes(68),
    "a header one byte longer than all": (len(TEXT) + 69).to_bytes(8, "little") + TEXT + bytes(68),
    "a header one byte too short": (len(TEXT) - 1).to_bytes(8, "little") + TEXT + bytes(68),
    "a header that is no UTF-8": lying(b"{\xff}", 0),
    "a header that is a list": lying([], 0),
    "a header that is null": lying(None, 0),
    "a header nested without end": lying(b'{"base":' + b"[" * 100_000, 0),
    "a tensor without dtype": lying({"base": {"shape": [], "data_offsets": [0, 0]}}, 0),
    "an unknown dtype": lying({**RIGHT_HEADER, "base": entry("F31", [3, 4], 0, 48)}, 68),
    "offsets beyond the end": lying({**RIGHT_HEADER, "targets": entry("I32", [5], 49, 69)}, 68),
    "offsets far beyond the end": lying(
        {**RIGHT_HEADER, "targets": entry("I32", [5], 2**63, 2**63 + 20)}, 68
    ),
    "offsets that overlap": lying({**RIGHT_HEADER, "targets": entry("I32", [5], 28, 48)}, 48),
    "the same bytes for two": lying({"base": BASE, "targets": entry("I32", [12], 0, 48)}, 48),
    "offsets with a hole": lying({**RIGHT_HEADER, "targets": entry("I32", [5], 52, 72)}, 72),
    "offsets that run backwards": lying({**RIGHT_HEADER, "base": entry("F32", [3, 4], 48, 0)}, 68),
    "a negative offset": lying({**RIGHT_HEADER, "base": entry("F32", [3, 4], -48, 0)}, 68),
    "an offset that is a fraction": lying({"base": entry("F32", [3, 4], 0, 48.5)}, 48),
    "more bytes than tensors": lying(RIGHT_HEADER, 69),
    "fewer bytes than tensors": lying(RIGHT_HEADER, 67),
    "a shape larger than its bytes": lying(
        {**RIGHT_HEADER, "base": entry("F32", [4, 4], 0, 48)}, 68
    ),
    "a shape whose size overflows": lying(
        {**RIGHT_HEADER, "base": entry("F32", [2**62, 2**62], 0, 48)}, 68
    ),
    "a shape whose size overflows to the right one": lying(
        {**RIGHT_HEADER, "base": entry("F32", [2**62 + 3, 4], 0, 48)}, 68
    ),
    "a negative shape": lying({**RIGHT_HEADER, "base": entry("F32", [-3, -4], 0, 48)}, 68),
}


def test_the_right_header_would_be_taken() -> None:
    decoded = decode_tensors(lying(RIGHT_HEADER, 68), EXPECTED)
    assert decoded["base"].tolist() == [[0.0] * 4] * 3
    assert decoded["targets"].tolist() == [0] * 5


@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies_is_refused(what: str) -> None:
    assert refused(LIES[what]).startswith("bundle is no safetensors byte string: ")


HUGE = {
    "no numbers in rows without end": [0, 2**40],
    "no numbers in more rows than there are": [0, 2**63],
    "no numbers and as many rows as can be written": [0, 2**64 - 1],
}


@pytest.mark.parametrize("what", HUGE)
def test_an_empty_tensor_of_a_huge_shape_is_refused_as_any_other_shape(what: str) -> None:
    shape = HUGE[what]
    data = lying({"base": entry("F32", shape, 0, 0), "targets": entry("I32", [5], 0, 20)}, 20)
    assert refused(data) == f"tensor 'base' must have shape [3, 4], got {shape}"


def test_a_tensor_nobody_asked_for_is_refused_whatever_it_is() -> None:
    odd = {
        "x": entry("F32", [0, 2**64 - 1], 68, 68),
        "y": entry("F4", [0], 68, 68),
        "z": entry("F8_E8M0", [0], 68, 68),
    }
    message = refused(lying({**RIGHT_HEADER, **odd}, 68))
    assert message == "2 tensors expected, got 5; not expected: 'x'"


# ---------------------------------------------------------------------- fuzz


def assert_refused_or_as_expected(data: bytes) -> None:
    try:
        decoded = decode_tensors(data, EXPECTED)
    except BundleError:
        return
    assert decoded.keys() == EXPECTED.keys()
    for name, spec in EXPECTED.items():
        assert decoded[name].dtype in spec.dtypes
        assert tuple(decoded[name].shape) == spec.shape
        assert bool(torch.isfinite(decoded[name]).all())


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_or_right(data: bytes) -> None:
    assert_refused_or_as_expected(data)


RIGHT_DATA = encode_tensors(right_tensors(), "raw")


@settings(deadline=None, max_examples=300)
@given(flips=st.lists(st.integers(0, 8 * len(RIGHT_DATA) - 1), min_size=1, max_size=4))
def test_a_right_bundle_with_flipped_bits_is_refused_or_right(flips: list[int]) -> None:
    data = bytearray(RIGHT_DATA)
    for bit in flips:
        data[bit // 8] ^= 1 << bit % 8
    assert_refused_or_as_expected(bytes(data))


@settings(deadline=None, max_examples=100)
@given(start=st.integers(0, len(RIGHT_DATA)), stop=st.integers(0, len(RIGHT_DATA)))
def test_a_right_bundle_without_some_of_its_bytes_is_refused(start: int, stop: int) -> None:
    data = RIGHT_DATA[: min(start, stop)] + RIGHT_DATA[max(start, stop) :]
    if data != RIGHT_DATA:
        with pytest.raises(BundleError):
            decode_tensors(data, EXPECTED)


sizes = st.one_of(st.integers(0, 70), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1]))
dtypes = st.sampled_from(
    ["F32", "BF16", "I32", "F64", "F16", "I64", "U64", "BOOL", "C64", "F8_E5M2", "F8_E8M0", "F4"]
)
entries = st.builds(entry, dtypes, st.lists(sizes, max_size=3), sizes, sizes)
headers = st.dictionaries(st.sampled_from(["base", "targets", "", "\x00"]), entries, max_size=3)


@settings(deadline=None, max_examples=300)
@given(header=headers, num_bytes=st.integers(0, 80))
@example(
    header={"base": entry("F32", [0, 2**63], 0, 0), "targets": entry("I32", [5], 0, 20)},
    num_bytes=20,
)
@example(header={"base": entry("F4", [], 0, 0), "targets": entry("I32", [5], 0, 20)}, num_bytes=20)
def test_headers_of_odd_entries_are_refused_or_right(
    header: dict[str, Any], num_bytes: int
) -> None:
    assert_refused_or_as_expected(lying(header, num_bytes))
