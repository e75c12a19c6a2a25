"""Activations of clients that do not train: sent once, kept on disk for all later epochs.

One file a sample, named for its number and its content's SHA-256, in a folder of the run's
fingerprint, which covers the front's: nothing of another front is ever taken for this one's. What
is used often the system keeps in memory by itself.
"""

import hashlib
import logging
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch

from lesft.errors import OutOfOrder
from lesft.files import write_atomically
from lesft.micro_batch import MicroBatch, Path, StepKey, Targets
from lesft.spec import Encoding, RunSpec
from lesft.step_messages import encode_batch
from lesft.tensors import load_encoded
from lesft_server.ledger import check_same

SAMPLES_FOLDER = "activations"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _File:
    path: FilePath
    digest: bytes


class SampleStore:
    """The samples of all clients, within a limit of disk space."""

    def __init__(self, state: FilePath, spec: RunSpec, max_bytes: int) -> None:
        """Reads what is kept of this run, and drops what is of another or was damaged."""
        self._spec = spec
        self._root = state / SAMPLES_FOLDER
        self._folder = self._root / spec.fingerprint().partition(":")[2][:16]
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._full = False
        self.num_bytes = 0
        """Disk space in use."""
        for folder in self._root.iterdir() if self._root.is_dir() else ():
            if folder != self._folder:
                shutil.rmtree(folder)
        for path in list(self._folder.rglob("*")):
            if path.is_file():
                self._check(path)

    def of(self, client_id: str, instance_id: str) -> "HeldSamples":
        """One client's samples; those of an earlier instance of it are dropped."""
        folder = self._folder / _hex(client_id) / _hex(instance_id)
        for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
            if other != folder:
                self.drop(other)
        return HeldSamples(self, self._spec, client_id, folder)

    def drop(self, folder: FilePath) -> None:
        """Delete a client's samples."""
        with self._lock:
            self.num_bytes -= sum(path.stat().st_size for path in _samples_in(folder))
        shutil.rmtree(folder, ignore_errors=True)  # its session may be writing yet

    def keep(self, path: FilePath, data: bytes) -> bool:
        """Write a sample's file, if there is room; returns whether it is there for good."""
        if path.exists():
            return True  # by an earlier session of the client, while this one was opened
        with self._lock:
            if self.num_bytes + len(data) > self._max_bytes:
                self._say_full(f"--kept-activations-mib is {self._max_bytes >> 20}")
                return False
            self.num_bytes += len(data)
        try:
            write_atomically(path, data)
        except OSError as error:
            with self._lock:
                self.num_bytes -= len(data)
            self._say_full(str(error))
            return False
        return True

    def _say_full(self, reason: str) -> None:
        if not self._full:
            self._full = True
            log.warning("no room for more activations, clients send them again: %s", reason)

    def _check(self, path: FilePath) -> None:
        data = path.read_bytes()
        if path.stem.partition("-")[2] == hashlib.sha256(data).hexdigest():
            self.num_bytes += len(data)
        else:
            log.warning("%s is damaged; its client sends it again", path)
            path.unlink()


class HeldSamples:
    """One client's samples."""

    def __init__(self, store: SampleStore, spec: RunSpec, client_id: str, folder: FilePath) -> None:
        self._store = store
        self._spec = spec
        self._client_id = client_id
        self._folder = folder
        self._files: dict[int, _File] = {}
        for path in _samples_in(folder):
            number, _, digest = path.stem.partition("-")
            self._files[int(number)] = _File(path, bytes.fromhex(digest))

    @property
    def numbers(self) -> list[int]:
        """The samples that need not be sent again."""
        return sorted(self._files)

    def among(self, samples: Iterable[int]) -> list[int]:
        """Those of some samples that need not be sent again."""
        return sorted(self._files.keys() & set(samples))

    def drop(self) -> None:
        """Delete them: the run is over for their client."""
        self._files.clear()
        self._store.drop(self._folder)

    def check_complete(self, samples: Iterable[int], enclosed: Iterable[int]) -> None:
        """Raises OutOfOrder for a sample that is neither enclosed nor held."""
        for number in sorted(set(samples) - set(enclosed) - self._files.keys()):
            raise OutOfOrder(
                f"sample {number} of client {self._client_id!r} is not held here: enclose its "
                "activations"
            )

    def complete(self, received: MicroBatch) -> tuple[MicroBatch, bytes]:
        """The whole micro-batch and the SHA-256 of its contents; what is enclosed is kept.

        Raises OutOfOrder when a sample is not what was sent before under its number.
        """
        digest = hashlib.sha256(str(received.key).encode())
        fresh = dict(zip(received.enclosed, _singles(received), strict=True))
        singles = []
        for number in received.samples:
            if number in fresh:
                data = encode_batch(fresh[number], self._spec.activation_encoding)
                sample_digest = hashlib.sha256(data).digest()
                self._keep(number, received.key, data, sample_digest)
                singles.append(fresh[number])
            else:
                file = self._files[number]
                sample_digest = file.digest
                encoding = self._spec.activation_encoding
                width = received.base.activations_ND.shape[1]
                singles.append(_decode(received.key, file.path.read_bytes(), encoding, width))
            digest.update(number.to_bytes(4, "big") + sample_digest)
        return _joined(received, singles), digest.digest()

    def _keep(self, number: int, key: StepKey, data: bytes, digest: bytes) -> None:
        held = self._files.get(number)
        if held is not None:
            check_same(self._client_id, key, held.digest, digest)
            return
        path = self._folder / f"{number:06d}-{digest.hex()}.safetensors"
        if self._store.keep(path, data):
            self._files[number] = _File(path, digest)


def _singles(batch: MicroBatch) -> list[MicroBatch]:
    """A micro-batch as one of each of its samples."""
    base = _rows(batch.base)
    reference: list[Path] | list[None] = [None] * len(base)
    if batch.reference is not None:
        reference = _rows(batch.reference)
    targets = torch.split(batch.targets.ids_T, list(batch.targets.lengths))
    return [
        MicroBatch(batch.key, b, r, Targets(t, (len(t),)))
        for b, r, t in zip(base, reference, targets, strict=True)
    ]


def _rows(path: Path) -> list[Path]:
    rows = torch.split(path.activations_ND, list(path.lengths))
    return [Path(row, (len(row),)) for row in rows]


def _decode(key: StepKey, data: bytes, encoding: Encoding, width: int) -> MicroBatch:
    tensors = load_encoded(data, encoding, width)
    paths = {
        name: Path(tensors[name], (len(tensors[name]),))
        for name in ("base", "reference")
        if name in tensors
    }
    ids_T = tensors["targets"].long()
    return MicroBatch(key, paths["base"], paths.get("reference"), Targets(ids_T, (len(ids_T),)))


def _joined(received: MicroBatch, singles: list[MicroBatch]) -> MicroBatch:
    references = [single.reference for single in singles if single.reference is not None]
    return MicroBatch(
        key=received.key,
        base=_concatenated([single.base for single in singles]),
        reference=_concatenated(references) if references else None,
        targets=Targets(
            torch.cat([single.targets.ids_T for single in singles]),
            tuple(length for single in singles for length in single.targets.lengths),
        ),
        samples=received.samples,
        enclosed=received.enclosed,
    )


def _concatenated(paths: list[Path]) -> Path:
    return Path(
        torch.cat([path.activations_ND for path in paths]),
        tuple(length for path in paths for length in path.lengths),
    )


def _samples_in(folder: FilePath) -> Iterable[FilePath]:
    """The files that are whole; another session may be writing beside them."""
    return folder.glob("*.safetensors")


def _hex(name: str) -> str:
    """A name that is safe for a folder, whatever a client calls itself."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
