"""Codes of few bits by how often each comes up: Huffman's coding in the DEFLATE format (RFC 1951).

Quantised values gather around zero, so that a code of 4 bits tells some 3.4 and one of 8 some 7.5.
Repeats, which DEFLATE could look for as well, there are none: it would take three times as long and
find nothing. Loads no torch.
"""

import zlib

from lesft.errors import BundleError

_NO_HEADER = -zlib.MAX_WBITS
_MEMORY_LEVEL = 9
"""The most: one table of code lengths for each 32,768 bytes."""


def deflate(data: bytes) -> bytes:
    """The same bytes in fewer; at most 5 in 16,383 more, where all values are as frequent."""
    coder = zlib.compressobj(
        zlib.Z_BEST_SPEED, zlib.DEFLATED, _NO_HEADER, _MEMORY_LEVEL, zlib.Z_HUFFMAN_ONLY
    )
    return coder.compress(data) + coder.flush()


def inflate(what: str, data: bytes, num_bytes: int) -> bytes:
    """What `deflate` was given: `num_bytes`, and no more memory than that whatever `data` is.

    Raises BundleError, which begins with `what`, when they are not that.
    """
    decoder = zlib.decompressobj(_NO_HEADER)
    try:
        inflated = decoder.decompress(data, num_bytes + 1)
    except zlib.error as error:
        raise BundleError(f"{what} cannot be inflated: {error}") from None
    if len(inflated) != num_bytes or not decoder.eof or decoder.unused_data:
        found = f"{len(inflated)}{'' if decoder.eof else ' or more'}"
        raise BundleError(
            f"{what} must be one DEFLATE stream of {num_bytes} bytes, got one of {found} with "
            f"{len(decoder.unused_data)} bytes after it"
        )
    return inflated
