"""Large blocks go back to the kernel when they are free."""

import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, sys
from lesft.allocator import return_large_blocks

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c blocks mapped d e f g h".split()]

libc.mallinfo2.restype = Info
if "with" in sys.argv:
    return_large_blocks()
libc.free(libc.malloc(20 << 20))  # by itself, the allocator now keeps blocks up to this size
block = libc.malloc(8 << 20)
print(libc.mallinfo2().mapped >> 20)
"""


@pytest.mark.parametrize(("mode", "mapped_mib"), [("with", 8), ("without", 0)])
def test_a_large_block_is_a_mapping_of_its_own_also_after_one_was_freed(
    mode: str, mapped_mib: int
) -> None:
    command = [sys.executable, "-c", _PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == mapped_mib
