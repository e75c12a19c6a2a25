"""Adapters as changes: how far off, in how many bytes, and what is refused."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from lesft.adapter_codec import FloatArray, checksum, decode, decoded_bytes, encode
from lesft.entropy import deflate
from lesft.errors import BundleError, TooLarge
from lesft.spec import AdapterEncoding

ENOUGH = 1 << 20
SHAPES = {"b.lora_A": (8, 96), "a.lora_B": (50, 8), "c": (3,)}


def adapter(seed: int, scale: float = 1.0) -> dict[str, FloatArray]:
    random = np.random.default_rng(seed)
    return {
        name: (scale * random.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def changed(base: dict[str, FloatArray], by: float = 1e-3) -> dict[str, FloatArray]:
    change = adapter(9, by)
    return {name: base[name] + change[name] for name in base}


def flat(values: dict[str, FloatArray]) -> FloatArray:
    return np.concatenate([values[name].ravel() for name in SHAPES])


def same(one: dict[str, FloatArray], other: dict[str, FloatArray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(("encoding", "error", "bits"), [("int8", 0.012, 7.9), ("int4", 0.2, 3.6)])
def test_a_change_comes_back_nearly_as_it_was_in_few_bits(
    encoding: AdapterEncoding, error: float, bits: float
) -> None:
    base = adapter(0)
    now = changed(base)
    data = encode(now, encoding, base)
    found = decode(data, encoding, base, ENOUGH)
    assert {name: array.shape for name, array in found.items()} == SHAPES
    assert all(array.dtype == np.float32 for array in found.values())
    change = flat(now) - flat(base)
    off = np.linalg.norm(flat(found) - flat(now)) / np.linalg.norm(change)
    assert error / 3 < off < error
    assert len(load(data)["codes"]) * 8 / len(change) < bits + 1.2  # with its table, and zeros


def test_a_long_change_takes_the_bits_that_its_codes_tell() -> None:
    base = {"x": np.zeros((1000, 100), np.float32)}
    now = {"x": np.random.default_rng(0).standard_normal((1000, 100)).astype(np.float32)}
    assert len(encode(now, "int8", base)) * 8 / 100_000 < 7.7
    assert len(encode(now, "int4", base)) * 8 / 100_000 < 3.6


def test_by_hand() -> None:
    """The largest change is 14, so that a code of 4 bits stands for 2: 7 and -1.5, which is -2."""
    base = {"x": np.array([[1.0, 5.0]], np.float32)}
    now = {"x": np.array([[15.0, 2.0]], np.float32)}
    data = encode(now, "int4", base)
    tensors = load(data)
    assert tensors.keys() == {"codes", "scales"}
    assert tensors["scales"].tolist() == [2.0]
    packed = bytes([15 | 6 << 4] + [8 | 8 << 4] * 127)
    assert tensors["codes"].tobytes() == deflate(packed)
    assert decode(data, "int4", base, ENOUGH)["x"].tolist() == [[15.0, 1.0]]


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_without_a_base_values_travel_in_eight_bits_with_their_shapes(
    encoding: AdapterEncoding,
) -> None:
    whole = adapter(0)
    data = encode(whole, encoding, {})
    assert json.loads(load(data)["layout"].tobytes()) == {n: list(s) for n, s in SHAPES.items()}
    found = decode(data, encoding, {}, ENOUGH)
    assert {name: array.shape for name, array in found.items()} == SHAPES
    assert np.linalg.norm(flat(found) - flat(whole)) < 0.012 * np.linalg.norm(flat(whole))


def test_small_values_do_not_share_a_scale_with_another_tensors_large_ones() -> None:
    """Of LoRA, A begins with random values and B with zeros, to which training adds little."""
    whole = {"a": adapter(0)["c"], "b": np.full((4, 50), 2e-4, np.float32)}
    assert np.allclose(decode(encode(whole, "int8", {}), "int8", {}, ENOUGH)["b"], 2e-4, rtol=0.01)


def test_a_checksum_is_of_the_values_whatever_their_order() -> None:
    values = adapter(0)
    assert checksum(values) == checksum(dict(reversed(values.items()))) != checksum(adapter(1))
    assert checksum({}) == 0


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_no_change_is_none(encoding: AdapterEncoding) -> None:
    base = adapter(0)
    assert same(decode(encode(base, encoding, base), encoding, base, ENOUGH), base)


def test_order_of_names_makes_no_difference() -> None:
    base, now = adapter(0), changed(adapter(0))
    reverse = {name: now[name] for name in reversed(now)}
    assert encode(reverse, "int8", base) == encode(now, "int8", base)


@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e30])
def test_changes_of_any_size_stay_finite(factor: float) -> None:
    base = {name: np.zeros_like(array) for name, array in adapter(0).items()}
    now = adapter(1, factor)
    found = decode(encode(now, "int8", base), "int8", base, ENOUGH)
    limit = max(0.02 * np.abs(flat(now)).max(), 1e-44)
    assert np.abs(flat(found) - flat(now)).max() <= limit


# ---------------------------------------------------------------------- what is refused

BASE = adapter(0)
CODES = deflate(bytes(6 * 256))  # 768, 400 and 3 values are 3, 2 and 1 blocks
SCALES = np.ones(6, np.float32)


def stream(data: bytes) -> Any:
    return np.frombuffer(data, np.uint8)


def layout(value: object) -> Any:
    return stream(json.dumps(value).encode())


REFUSED: list[tuple[str, dict[str, Any], dict[str, FloatArray], str]] = [
    ("no codes", {"scales": SCALES}, BASE, "must hold codes (U8), scales (F32), got scales (F32)"),
    ("float codes", {"codes": SCALES, "scales": SCALES}, BASE, "got codes (F32), scales (F32)"),
    (
        "a layout beside a base",
        {"codes": stream(CODES), "scales": SCALES, "layout": layout({"x": [1]})},
        BASE,
        "got codes (U8), layout (U8), scales (F32)",
    ),
    (
        "a scale too few",
        {"codes": stream(CODES), "scales": SCALES[:5]},
        BASE,
        "scales must be 6 for these tensors, got 5",
    ),
    (
        "a code too few",
        {"codes": stream(deflate(bytes(1535))), "scales": SCALES},
        BASE,
        "codes must be one DEFLATE stream of 1536 bytes, got one of 1535",
    ),
    ("no layout", {"codes": stream(CODES), "scales": SCALES}, {}, "must hold codes (U8), layout"),
    *(
        (
            f"layout {value!r}",
            {"codes": stream(CODES), "scales": SCALES, "layout": layout(value)},
            {},
            said,
        )
        for value, said in (
            *(
                (value, "layout must be a JSON object of each tensor's shape: at most 8 sizes")
                for value in ([], {"x": 3}, {"x": [0]}, {"x": [-1, -5]}, {"x": [1] * 9})
            ),
            ({"x": [10**4000]}, "from 1 to 4294967295"),
            ({}, "holds no tensors"),
            ({"x" * 2_000_000: [1]}, "layout may have 1048576 bytes, got 2000009"),
        )
    ),
    (
        "a layout of brackets",
        {"codes": stream(CODES), "scales": SCALES, "layout": stream(b"[" * 100_000)},
        {},
        "layout must be a JSON object",
    ),
]


@pytest.mark.parametrize(
    ("what", "tensors", "base", "said"), REFUSED, ids=[r[0][:30] for r in REFUSED]
)
def test_what_is_no_adapter_is_refused(
    what: str, tensors: dict[str, Any], base: dict[str, FloatArray], said: str
) -> None:
    with pytest.raises(BundleError) as caught:
        decode(save(tensors), "int8", base, 1 << 23)
    assert said in str(caught.value)


def test_a_layout_of_more_than_is_accepted_is_refused_before_it_is_made() -> None:
    huge = {"codes": stream(b""), "scales": SCALES, "layout": layout({"x": [1 << 30, 1 << 30]})}
    with pytest.raises(TooLarge, match=f"adapter of {4 << 60} bytes once it is decoded"):
        decode(save(huge), "int8", {}, ENOUGH)


def test_scales_that_are_no_numbers_make_values_that_are_none() -> None:
    """Which the caller refuses, as in adapters that travel whole."""
    scales = np.array([np.inf, np.nan, 3e38, 1, 1, 1], np.float32)
    ones = deflate(bytes([100] * 1536))
    found = decode(save({"codes": stream(ones), "scales": scales}), "int8", BASE, ENOUGH)
    assert not np.isfinite(flat(found)).all()


def test_many_tiny_tensors_are_refused_by_the_memory_that_they_would_take() -> None:
    many = {f"{n}": np.ones(1, np.float32) for n in range(100)}
    data = encode(many, "int8", {})
    assert decoded_bytes(many) == 100 * 1024
    assert len(decode(data, "int8", {}, 100 * 1024)) == 100
    with pytest.raises(TooLarge, match="adapter of 102400 bytes once it is decoded"):
        decode(data, "int8", {}, 400)
