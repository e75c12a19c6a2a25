"""How the C library's allocator deals with memory that is free again."""

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_LARGE_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Have large blocks go back to the kernel as soon as they are free; glibc only.

    By itself it soon keeps blocks of up to 32 MiB to use them again, and tensors of many sizes that
    come and go then leave gaps that none fits: up to 2 GB of them in one step of a large front.
    Costs a little time, since the kernel hands out zeroed pages.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library, another allocator
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
