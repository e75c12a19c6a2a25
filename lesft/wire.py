"""Bytes on the wire by kind and direction, as the messages' serialized sizes."""

import json
import threading
from collections.abc import Mapping
from typing import Literal, get_args

from lesft.bundle import CHUNK_BYTES

Kind = Literal[
    "activations_base", "activations_reference", "gradients", "labels", "adapters", "other"
]
Direction = Literal["up", "down"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_KIND_OF_TENSOR: dict[str, Kind] = {
    "base": "activations_base",
    "reference": "activations_reference",
    "targets": "labels",
}


class WireCounter:
    """Counts what one client sends (up) and receives (down), on either end of the wire.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[Direction, dict[Kind, int]] = {
            "up": dict.fromkeys(KINDS, 0),
            "down": dict.fromkeys(KINDS, 0),
        }

    def add(self, direction: Direction, kind: Kind, num_bytes: int) -> None:
        """Count bytes of one kind."""
        with self._lock:
            self._bytes[direction][kind] += num_bytes

    def add_message(self, direction: Direction, num_bytes: int, parts: dict[Kind, int]) -> None:
        """Count a message of `num_bytes` of which `parts` are known; the rest is `other`."""
        with self._lock:
            counts = self._bytes[direction]
            for kind, part in parts.items():
                counts[kind] += part
            counts["other"] += num_bytes - sum(parts.values())

    def total(self, direction: Direction) -> int:
        """All bytes in one direction."""
        with self._lock:
            return sum(self._bytes[direction].values())

    def add_all(self, counts: Mapping[Direction, Mapping[Kind, int]]) -> None:
        """Count what an earlier process of this client counted: a `by_kind`."""
        with self._lock:
            for way, kinds in counts.items():
                for kind, count in kinds.items():
                    self._bytes[way][kind] += count

    def by_kind(self) -> dict[Direction, dict[Kind, int]]:
        """A copy of all counts: direction, kind, bytes."""
        with self._lock:
            return {way: dict(counts) for way, counts in self._bytes.items()}


def bundle_parts(bundle: bytes) -> dict[Kind, int]:
    """What the tensors of a micro-batch's bundle, which is known to be one, are of, in bytes."""
    parts: dict[Kind, int] = {}
    if bundle:
        header_bytes = len(bundle) - 8 - tensor_bytes(bundle)
        entries = json.loads(bundle[8 : 8 + header_bytes])
        for name, kind in _KIND_OF_TENSOR.items():
            ends = [entries[n]["data_offsets"] for n in (name, f"{name}.scale") if n in entries]
            if ends:
                parts[kind] = sum(stop - start for start, stop in ends)
    return parts


def tensor_bytes(bundle: bytes) -> int:
    """Size of the tensors in a bundle: all but the header, which it begins with the length of."""
    return len(bundle) - 8 - int.from_bytes(bundle[:8], "little") if bundle else 0


def chunk_messages_bytes(bundle_bytes: int) -> int:
    """Size of the messages, `TrainRequest` or `TrainResponse`, that carry a bundle's chunks.

    By arithmetic: protobuf would write each chunk once more to tell its size.
    """
    total = 0
    for index in range(-(-bundle_bytes // CHUNK_BYTES)):
        size = min(CHUNK_BYTES, bundle_bytes - index * CHUNK_BYTES)
        chunk = 1 + _varint_bytes(size) + size + (1 + _varint_bytes(index) if index else 0)
        total += 1 + _varint_bytes(chunk) + chunk
    return total


def _varint_bytes(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))
