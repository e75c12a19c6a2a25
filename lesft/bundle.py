"""Bundles on the wire: a byte string in numbered chunks with a length and a checksum.

What the tensors must be is checked by their reader; see `lesft.tensors`, `lesft.adapter_codec` and
the aggregator's `adapters`. Loads no torch.
"""

import zlib
from collections.abc import Iterator
from typing import Any

from safetensors import SafetensorError, deserialize

from lesft.errors import BundleError, TooLarge
from lesft.v1.tensor_pb2 import BundleInfo, Chunk

CHUNK_BYTES = 1 << 20
"""Size of every chunk but a bundle's last: the fastest in Python gRPC, measured on loopback."""

MIN_BUNDLE_BYTES = 8
"""The smallest safetensors byte string is its 8-byte header length."""


def tensor_views(what: str, data: bytes, max_header_bytes: int) -> dict[str, dict[str, Any]]:
    """Dtype, shape and data of each tensor of safetensors bytes, by name.

    A header of more than `max_header_bytes` is refused before anything reads it: one of many empty
    tensors takes 20 times its size in memory. Raises BundleError, which begins with `what`.
    """
    length = int.from_bytes(data[:8], "little")
    if length > max_header_bytes:
        raise BundleError(
            f"{what} is no safetensors byte string: its header has {length} bytes, but at most "
            f"{max_header_bytes} are allowed here"
        )
    try:
        return dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise BundleError(f"{what} is no safetensors byte string: {error}") from None


def bundle_info(data: bytes) -> BundleInfo:
    """The announcement of a bundle."""
    return BundleInfo(total_bytes=len(data), crc32=zlib.crc32(data))


def bundle_chunks(data: bytes) -> Iterator[Chunk]:
    """A bundle's chunks in order."""
    view = memoryview(data)
    for index, start in enumerate(range(0, len(data), CHUNK_BYTES)):
        yield Chunk(index=index, data=bytes(view[start : start + CHUNK_BYTES]))


def check_announced(info: BundleInfo, max_bytes: int) -> None:
    """Raises TooLarge or BundleError when an announcement alone breaks a rule."""
    if info.total_bytes > max_bytes:
        raise TooLarge(
            f"bundle of {info.total_bytes} bytes announced, but at most {max_bytes} are "
            "allowed here: send fewer or shorter samples per micro-batch"
        )
    if info.total_bytes < MIN_BUNDLE_BYTES:
        raise BundleError(
            f"bundle of {info.total_bytes} bytes announced, but a safetensors byte string "
            f"has at least {MIN_BUNDLE_BYTES}: announce the bundle before its chunks"
        )


class BundleReader:
    """Puts one announced bundle together again.

    Holds `total_bytes` from the start, never more; chunks must come in order, whole and once.
    """

    def __init__(self, info: BundleInfo, max_bytes: int) -> None:
        """Raises what `check_announced` raises."""
        check_announced(info, max_bytes)
        self._crc32 = info.crc32
        self._buffer = bytearray(info.total_bytes)
        self._received = 0
        self.next_index = 0
        """The chunk that must come next."""

    @property
    def complete(self) -> bool:
        """Whether all bytes are there."""
        return self._received == len(self._buffer)

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk. Raises BundleError for any other."""
        if self.complete:
            raise BundleError(f"chunk {chunk.index} after the bundle's last one: resend the bundle")
        if chunk.index != self.next_index:
            raise BundleError(
                f"chunk {self.next_index} expected, got chunk {chunk.index}: chunks must come "
                "in order, each once"
            )
        expected = min(CHUNK_BYTES, len(self._buffer) - self._received)
        if len(chunk.data) != expected:
            raise BundleError(
                f"chunk {chunk.index} must have {expected} bytes, got {len(chunk.data)}"
            )
        self._buffer[self._received : self._received + expected] = chunk.data
        self._received += expected
        self.next_index += 1

    def data(self) -> bytes:
        """The whole bundle. Raises BundleError when bytes are missing or were damaged."""
        if not self.complete:
            raise BundleError(
                f"bundle ended after {self._received} of {len(self._buffer)} bytes: chunk "
                f"{self.next_index} is missing"
            )
        crc32 = zlib.crc32(self._buffer)
        if crc32 != self._crc32:
            raise BundleError(
                f"bundle has checksum {crc32:08x}, but {self._crc32:08x} was announced: it was "
                "damaged on the way, send it again"
            )
        return bytes(self._buffer)
