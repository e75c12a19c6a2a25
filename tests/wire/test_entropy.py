"""Huffman-coded bytes: the same again, fewer where some are more frequent, nothing else let in."""

import tracemalloc
import zlib

import numpy as np
import pytest

from lesft.entropy import deflate, inflate
from lesft.errors import BundleError


def codes(count: int, largest: int) -> bytes:
    """Of values around zero, as quantised ones are."""
    values = np.random.default_rng(0).normal(0, largest / 2.5, count)
    return np.rint(values).clip(-largest, largest).astype(np.int8).tobytes()


@pytest.mark.parametrize(
    "data", [b"", b"\x00", bytes(range(256)), bytes(100_000), codes(70_000, 7)]
)
def test_what_was_deflated_comes_back(data: bytes) -> None:
    assert inflate("it", deflate(data), len(data)) == data
    assert zlib.decompress(deflate(data), -15) == data  # and is what the contract calls it


def test_frequent_values_take_fewer_bits_and_even_ones_hardly_more() -> None:
    assert len(deflate(codes(100_000, 7))) < 0.48 * 100_000  # of bytes: 3.6 bits for each code
    assert len(deflate(codes(100_000, 127))) < 0.98 * 100_000
    even = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    assert len(even) < len(deflate(even)) < len(even) + 40


def test_another_length_or_no_stream_is_refused() -> None:
    stream = deflate(b"abc" * 100)
    for data, said in (
        (deflate(b"abc" * 99), "must be one DEFLATE stream of 300 bytes, got one of 297 with 0"),
        (deflate(b"abc" * 101), "got one of 301 or more with 0"),
        (stream[:-3], " or more with 0"),
        (b"", "got one of 0 or more with 0"),
        (stream + b"xy", "got one of 300 with 2"),
        (b"\xff" * 40, "cannot be inflated: Error -3"),
        (zlib.compress(b"abc" * 100), "cannot be inflated: Error -3"),
    ):
        with pytest.raises(BundleError, match=r"^it ") as caught:
            inflate("it", data, 300)
        assert said in str(caught.value)


def test_a_stream_of_a_thousand_times_its_size_takes_no_more_memory_than_is_due() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = bomb.compress(bytes(50_000_000)) + bomb.flush()
    assert len(stream) < 60_000
    tracemalloc.start()
    with pytest.raises(BundleError, match="got one of 1001 or more"):
        inflate("it", stream, 1000)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
