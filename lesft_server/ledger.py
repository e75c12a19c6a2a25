"""The ledger: every answer that was given since the checkpoint before the last, kept on disk.

A client that comes back sends again what it has no answer to, and the ledger has the answer: the
step is not taken a second time. A request that differs from the one that was answered is a fork and
refused. Only an index is in memory.

The time between two checkpoints is a window, and a window is a file `round-N.ledger`, named for the
round it begins with. When a window is closed it is forced to disk, and all but the one before are
dropped. The open one need not survive a crash: the server then goes back to its beginning.
"""

import logging
import os
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from lesft.errors import LeftBehind, OutOfOrder
from lesft.files import sync_folder
from lesft.micro_batch import StepKey
from lesft.v1 import training_pb2

log = logging.getLogger(__name__)

_NAME = re.compile(r"round-(\d{6,})\.ledger")
_HEAD = struct.Struct(">H32sIQ")
"""What an entry begins with: lengths of client id, header and bundle, and between them the
request's SHA-256. Client id, header and bundle follow."""


@dataclass(frozen=True)
class Entry:
    """One client's answer to one request."""

    client_id: str
    digest: bytes
    """SHA-256 of the request that is answered."""
    header: training_pb2.StepResult
    bundle: bytes


@dataclass(frozen=True)
class _Place:
    window: int
    offset: int
    header_bytes: int
    bundle_bytes: int
    digest: bytes


class Ledger:
    """Appended to by one thread; read from any."""

    def __init__(self, folder: Path, round_index: int) -> None:
        """Go on at the beginning of a round; what was answered from it on is dropped."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._index: dict[tuple[str, StepKey], _Place] = {}
        self._files: dict[int, BinaryIO] = {}
        self._lock = threading.Lock()
        for window in self._windows_on_disk():
            if window >= round_index:
                self._path(window).unlink()
            else:
                self._open(window)
                self._index |= dict(self._scan(window))
        self._window = round_index
        self._open(round_index)

    @property
    def first_round(self) -> int:
        """All answers from this round on are there."""
        return min(self._files)

    @property
    def num_bytes(self) -> int:
        """Disk in use."""
        with self._lock:
            return sum(os.fstat(file.fileno()).st_size for file in list(self._files.values()))

    def has(self, client_id: str, key: StepKey) -> bool:
        """Whether there is an answer."""
        return (client_id, key) in self._index

    def find(self, client_id: str, key: StepKey, digest: bytes) -> bool:
        """Whether a request was answered. Raises OutOfOrder when it was another one."""
        place = self._index.get((client_id, key))
        if place is not None:
            check_same(client_id, key, place.digest, digest)
        return place is not None

    def read(self, client_id: str, key: StepKey) -> tuple[training_pb2.StepResult, bytes]:
        """The answer to a request that `find` has found.

        Raises LeftBehind when it was dropped meanwhile: the others are two windows ahead.
        """
        place = self._index.get((client_id, key))
        with self._lock:  # a file that is closed meanwhile may give its descriptor to another
            file = self._files.get(place.window) if place else None
            if place is None or file is None:
                raise LeftBehind(f"client {client_id!r} has not read its answers for two windows")
            size = place.header_bytes + place.bundle_bytes
            data = os.pread(file.fileno(), size, place.offset)
        header = training_pb2.StepResult.FromString(data[: place.header_bytes])
        return header, data[place.header_bytes :]

    def append(self, entries: Sequence[Entry]) -> None:
        """Keep the answers of one step.

        Raises OSError when there is no room: then none of them is kept.
        """
        file = self._files[self._window]
        start = offset = file.seek(0, os.SEEK_END)
        places = {}
        try:
            for entry in entries:
                key = StepKey(entry.header.round, entry.header.micro)
                name, header = entry.client_id.encode(), entry.header.SerializeToString()
                head = _HEAD.pack(len(name), entry.digest, len(header), len(entry.bundle))
                offset += len(head) + len(name)
                places[entry.client_id, key] = _Place(
                    self._window, offset, len(header), len(entry.bundle), entry.digest
                )
                offset += len(header) + len(entry.bundle)
                _write(file, head + name + header)
                _write(file, entry.bundle)
        except OSError:
            file.truncate(start)
            raise
        self._index |= places

    def close_window(self) -> None:
        """Force the open window to disk: a server that begins after it can answer from it."""
        os.fsync(self._files[self._window].fileno())
        sync_folder(self._folder)

    def open_window(self, round_index: int) -> None:
        """Begin a window and drop all but the one before it."""
        self._open(round_index)  # first: it may fail and be tried again
        kept = {self._window, round_index}
        for window in self._files.keys() - kept:
            with self._lock:
                self._files.pop(window).close()
            self._path(window).unlink()
        self._index = {name: place for name, place in self._index.items() if place.window in kept}
        self._window = round_index

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()

    # ------------------------------------------------------------------ its pieces

    def _path(self, window: int) -> Path:
        return self._folder / f"round-{window:06d}.ledger"

    def _windows_on_disk(self) -> list[int]:
        names = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        return sorted(int(name[1]) for name in names if name)

    def _open(self, window: int) -> None:
        # Unbuffered: an entry that does not fit on the disk must not linger in a buffer.
        self._files[window] = self._path(window).open("a+b", buffering=0)

    def _scan(self, window: int) -> Iterator[tuple[tuple[str, StepKey], _Place]]:
        """The entries of a closed window; those behind a damaged one are lost."""
        descriptor, offset = self._files[window].fileno(), 0
        end = os.fstat(descriptor).st_size
        while offset < end:
            try:
                head = os.pread(descriptor, _HEAD.size, offset)
                name_bytes, digest, header_bytes, bundle_bytes = _HEAD.unpack(head)
                offset += _HEAD.size
                text = os.pread(descriptor, name_bytes + header_bytes, offset)
                name = text[:name_bytes].decode()
                header = training_pb2.StepResult.FromString(text[name_bytes:])
                offset += name_bytes
                if offset + header_bytes + bundle_bytes > end:
                    raise ValueError("it ends too early")
            except (struct.error, UnicodeDecodeError, DecodeError, ValueError) as error:
                log.warning("%s is damaged at byte %d: %s", self._path(window), offset, error)
                return
            key = StepKey(header.round, header.micro)
            yield (name, key), _Place(window, offset, header_bytes, bundle_bytes, digest)
            offset += header_bytes + bundle_bytes


def _write(file: BinaryIO, data: bytes) -> None:
    """All of it: an unbuffered file may take less when the disk is almost full."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def check_same(client_id: str, key: StepKey, known: bytes, digest: bytes) -> None:
    """Raises OutOfOrder when a request is not the one that was sent before."""
    if known != digest:
        raise OutOfOrder(
            f"client {client_id!r} sent {key} with other activations or labels before: a client "
            "must not fork; start it with the same data, --device, --precision and --threads as "
            "before"
        )
