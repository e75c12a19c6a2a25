"""Bundles in chunks: what is right comes through, and each rule refuses by its name what is not."""

import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lesft.bundle import CHUNK_BYTES, BundleReader, bundle_chunks, bundle_info
from lesft.errors import BundleError, TooLarge
from lesft.v1.tensor_pb2 import BundleInfo, Chunk

DATA = random.Random(0).randbytes(2 * CHUNK_BYTES + 100)

around_borders = st.builds(
    lambda chunks, step: max(8, chunks * CHUNK_BYTES + step), st.integers(0, 3), st.integers(-9, 9)
)


def reader_of(data: bytes, max_bytes: int = 1 << 30) -> BundleReader:
    return BundleReader(bundle_info(data), max_bytes)


@settings(deadline=None, max_examples=40)
@given(size=around_borders, seed=st.integers(0, 2**32))
def test_what_is_cut_into_chunks_is_put_together_again(size: int, seed: int) -> None:
    data = random.Random(seed).randbytes(size)
    chunks = list(bundle_chunks(data))
    assert [chunk.index for chunk in chunks] == list(range(-(-size // CHUNK_BYTES)))
    assert {len(chunk.data) for chunk in chunks[:-1]} <= {CHUNK_BYTES}
    assert 1 <= len(chunks[-1].data) <= CHUNK_BYTES

    reader = reader_of(data, max_bytes=size)
    for index, chunk in enumerate(chunks):
        assert not reader.complete
        assert reader.next_index == index
        reader.add(Chunk.FromString(chunk.SerializeToString()))
    assert reader.complete
    assert reader.data() == data


def test_the_announcement_has_length_and_checksum() -> None:
    # The check value that every description of CRC-32 (ISO 3309) names.
    info = bundle_info(b"123456789")
    assert (info.total_bytes, info.crc32) == (9, 0xCBF43926)


def test_a_bundle_announced_over_the_limit_is_refused_before_it_takes_any_room() -> None:
    with pytest.raises(TooLarge) as caught:
        BundleReader(BundleInfo(total_bytes=2**63), max_bytes=1000)
    assert str(caught.value) == (
        "bundle of 9223372036854775808 bytes announced, but at most 1000 are allowed here: send "
        "fewer or shorter samples per micro-batch"
    )
    with pytest.raises(TooLarge):
        BundleReader(BundleInfo(total_bytes=1001), max_bytes=1000)
    assert not BundleReader(BundleInfo(total_bytes=1000), max_bytes=1000).complete


@pytest.mark.parametrize("size", [0, 7])
def test_a_bundle_announced_too_small_is_refused(size: int) -> None:
    with pytest.raises(BundleError) as caught:
        BundleReader(BundleInfo(total_bytes=size), max_bytes=1000)
    assert str(caught.value) == (
        f"bundle of {size} bytes announced, but a safetensors byte string has at least 8: announce "
        "the bundle before its chunks"
    )


ORDERS = {
    "the first is missing": (0, 1),
    "one in the middle is missing": (1, 2),
    "one is repeated": (1, 0),
    "the last is repeated before it came": (2, 1),
    "one has a number of another bundle": (2, 2**32 - 1),
}


@pytest.mark.parametrize("what", ORDERS)
def test_chunks_must_come_in_order_each_once(what: str) -> None:
    due, got = ORDERS[what]
    chunks = list(bundle_chunks(DATA))
    reader = reader_of(DATA)
    for chunk in chunks[:due]:
        reader.add(chunk)
    with pytest.raises(BundleError) as caught:
        reader.add(Chunk(index=got, data=chunks[due].data))
    assert str(caught.value) == (
        f"chunk {due} expected, got chunk {got}: chunks must come in order, each once"
    )


LENGTHS = {
    "a first one too short": (0, CHUNK_BYTES - 1, CHUNK_BYTES),
    "a first one too long": (0, CHUNK_BYTES + 1, CHUNK_BYTES),
    "an empty one": (1, 0, CHUNK_BYTES),
    "a last one too short": (2, 99, 100),
    "a last one too long": (2, 101, 100),
    "a last one as long as the others": (2, CHUNK_BYTES, 100),
}


@pytest.mark.parametrize("what", LENGTHS)
def test_a_chunk_of_another_length_is_refused(what: str) -> None:
    index, length, due = LENGTHS[what]
    reader = reader_of(DATA)
    for chunk in list(bundle_chunks(DATA))[:index]:
        reader.add(chunk)
    with pytest.raises(BundleError) as caught:
        reader.add(Chunk(index=index, data=bytes(length)))
    assert str(caught.value) == f"chunk {index} must have {due} bytes, got {length}"


def test_a_chunk_that_was_refused_leaves_the_reader_as_it_was() -> None:
    reader = reader_of(DATA)
    chunks = list(bundle_chunks(DATA))
    for wrong in (chunks[1], Chunk(index=0, data=b"short")):
        with pytest.raises(BundleError):
            reader.add(wrong)
    for chunk in chunks:
        reader.add(chunk)
    assert reader.data() == DATA


def test_a_chunk_after_the_last_is_refused() -> None:
    reader = reader_of(DATA)
    for chunk in bundle_chunks(DATA):
        reader.add(chunk)
    for index in (3, 2):
        with pytest.raises(BundleError) as caught:
            reader.add(Chunk(index=index, data=b"x"))
        assert str(caught.value) == (
            f"chunk {index} after the bundle's last one: resend the bundle"
        )
    assert reader.data() == DATA


def test_a_bundle_that_ends_early_is_refused() -> None:
    reader = reader_of(DATA)
    for index, chunk in enumerate(bundle_chunks(DATA)):
        with pytest.raises(BundleError) as caught:
            reader.data()
        assert str(caught.value) == (
            f"bundle ended after {index * CHUNK_BYTES} of {len(DATA)} bytes: chunk {index} is "
            "missing"
        )
        reader.add(chunk)
    assert reader.data() == DATA


@settings(deadline=None, max_examples=20)
@given(bit=st.integers(0, 8 * len(DATA) - 1))
def test_one_wrong_bit_anywhere_is_noticed(bit: int) -> None:
    damaged = bytearray(DATA)
    damaged[bit // 8] ^= 1 << bit % 8
    reader = reader_of(DATA)
    for chunk in bundle_chunks(bytes(damaged)):
        reader.add(chunk)
    with pytest.raises(BundleError) as caught:
        reader.data()
    assert str(caught.value) == (
        f"bundle has checksum {zlib.crc32(damaged):08x}, but {zlib.crc32(DATA):08x} was announced: "
        "it was damaged on the way, send it again"
    )
