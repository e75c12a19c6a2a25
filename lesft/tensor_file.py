"""One safetensors file: a tensor is mapped, or parts of it are read without mapping them.

Mapped weights are the file's own pages: never copied, shared between processes, and dropped by the
kernel where memory is short. Pages of a mapping that were touched do count as resident, so what is
needed once, or a few rows at a time, is better read.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open


class Entry(NamedTuple):
    """A tensor of a file: its name, safetensors dtype such as "BF16", shape and size."""

    name: str
    dtype: str
    shape: Sequence[int]
    num_bytes: int


def file_header(tensors: Iterable[Entry]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What a safetensors file of these tensors, one after another, begins with.

    And where each one's data begins and ends behind that.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, dtype, shape, num_bytes in tensors:
        start, end = end, end + num_bytes
        spans[name] = (start, end)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, spans


class TensorFile:
    """Stays open; nothing of a tensor is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or SafetensorError for what is no whole safetensors file."""
        mapping: Any = safe_open(path, framework="pt")  # it checks the header
        self._mapping = mapping
        self.names: list[str] = list(mapping.keys())
        self._file = path.open("rb", buffering=0)
        header_bytes = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(header_bytes))
        self._spans = {
            name: [8 + header_bytes + offset for offset in header[name]["data_offsets"]]
            for name in self.names
        }
        self._no_rows: dict[str, torch.Tensor] = {}

    def dtype_and_shape(self, name: str) -> tuple[str, list[int]]:
        """A tensor's safetensors dtype (such as "BF16") and shape."""
        view = self._mapping.get_slice(name)
        return view.get_dtype(), list(view.get_shape())

    def mapped(self, name: str) -> torch.Tensor:
        """The tensor on the CPU as it is stored: a view of the file, to be left as it is."""
        tensor: torch.Tensor = self._mapping.get_tensor(name)
        return tensor

    def read_bytes(self, name: str, start: int, stop: int) -> bytearray:
        """Bytes of a tensor's data; fewer where it ends before `stop`."""
        first, end = self._spans[name]
        data = bytearray(max(0, min(first + stop, end) - first - start))
        done = 0
        while done < len(data):
            rest = memoryview(data)[done:]
            read = os.preadv(self._file.fileno(), [rest], first + start + done)
            if not read:
                raise OSError(f"{self._file.name} has become shorter")
            done += read
        return data

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, in memory of its own."""
        tensor = self.mapped(name)
        data = self.read_bytes(name, 0, tensor.nbytes)
        return torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """`[start:stop]` of a tensor, in memory of its own."""
        if name not in self._no_rows:  # mapping it anew each time would take longer than the row
            self._no_rows[name] = self.mapped(name)[:0]
        dtype, row = self._no_rows[name].dtype, self._no_rows[name].shape[1:]
        row_bytes = row.numel() * dtype.itemsize
        data = self.read_bytes(name, start * row_bytes, stop * row_bytes)
        return torch.frombuffer(data, dtype=dtype).reshape(-1, *row)
