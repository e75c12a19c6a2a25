"""Where the front's weights come from: the model folder, or the server's hand-out, kept in a cache.

A cached front is an ordinary Hugging Face folder of config.json and model.safetensors that holds
just the front's tensors, named by its fingerprint. A cut download goes on where it ended.
"""

import fcntl
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lesft.errors import (
    BundleError,
    HandshakeMismatch,
    ModelError,
    OutOfOrder,
    TooLarge,
    one_line,
)
from lesft.files import sync_folder, write_atomically
from lesft.hub import model_folder
from lesft.interceptors import remote_errors
from lesft.v1 import model_pb2, model_pb2_grpc
from lesft.weights import Checkpoint, front_fingerprint
from lesft.wire import WireCounter
from lesft_client.patience import patiently

log = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


def local_checkpoint(model: str, weights: str) -> Checkpoint | None:
    """The model folder as a checkpoint when its weights are to be used, else None.

    With --weights local the hub's are fetched where `model` is one of its ids. Raises ModelError
    when that asks for weights that are not there.
    """
    folder = model_folder(model) if weights == "local" else Path(model)
    has_weights = folder.is_dir() and any(folder.glob("*.safetensors"))
    if weights == "local" and not has_weights:
        raise ModelError(
            f"--weights local needs safetensors files in the folder --model {model}; leave it out "
            "to fetch the front from the server"
        )
    return Checkpoint(folder) if has_weights and weights != "server" else None


def fetched_checkpoint(
    stub: model_pb2_grpc.ModelServiceStub,
    description: model_pb2.DescribeRunResponse,
    cache: Path,
    party: str,
    patience_seconds: float,
    wire: WireCounter,
    progress: Callable[[int, int], None],
) -> Checkpoint:
    """The run's front from the cache, fetched into it first where it is not there yet.

    `progress` is told the bytes done and the bytes in all. Raises HandshakeMismatch when what came
    does not have the fingerprint that the server named, and is deleted then, or when that is none.
    """
    fingerprint = description.spec.front_fingerprint
    if not _FINGERPRINT.fullmatch(fingerprint):  # it names a folder
        raise HandshakeMismatch(
            f"{party}: front_fingerprint must be sha256: and 64 hex digits, got "
            f"{one_line(fingerprint)!r}; is it a LESFT server?"
        )
    folder = cache / f"front-{fingerprint.removeprefix('sha256:')[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not (folder / WEIGHTS_FILE).exists():
            write_atomically(folder / "config.json", description.config_json.encode())
            part = folder / f"{WEIGHTS_FILE}.part"
            download = _Download(stub, fingerprint, part, description.front_bytes, party, wire)
            patiently(lambda: download.resume(progress), patience_seconds, progress=download.size)
            part.replace(folder / WEIGHTS_FILE)
            sync_folder(folder)
        return _verified(folder, fingerprint, description.spec.cut_layer)


def _verified(folder: Path, fingerprint: str, cut_layer: int) -> Checkpoint:
    """The folder's checkpoint; without the right fingerprint, the weights are deleted."""
    try:
        checkpoint = Checkpoint(folder)
        found = front_fingerprint(checkpoint, cut_layer)
    except ValueError as error:
        found = f"what cannot be read ({error})"
    if found != fingerprint:
        (folder / WEIGHTS_FILE).unlink()
        raise HandshakeMismatch(
            f"front_fingerprint: server {fingerprint}, fetched {found}; the copy in --cache was "
            "deleted, start again to fetch it anew"
        )
    return checkpoint


class _Download:
    """A file that grows by verified pieces and can be taken up again at its end."""

    def __init__(
        self,
        stub: model_pb2_grpc.ModelServiceStub,
        fingerprint: str,
        part: Path,
        total_bytes: int,
        party: str,
        wire: WireCounter,
    ) -> None:
        self._stub = stub
        self._fingerprint = fingerprint
        self._part = part
        self._total_bytes = total_bytes
        self._party = party
        self._wire = wire

    def size(self) -> int:
        """Bytes that are there already."""
        return self._part.stat().st_size if self._part.exists() else 0

    def resume(self, progress: Callable[[int, int], None]) -> None:
        """Fetch what is missing. Raises Unreachable when the connection breaks; then call again."""
        with self._part.open("ab") as file, remote_errors(self._party):
            if file.tell() > self._total_bytes:
                file.truncate(0)  # no part of this front, whatever it is
            offset = file.seek(0, os.SEEK_END)
            request = model_pb2.FetchFrontRequest(
                front_fingerprint=self._fingerprint, offset_bytes=offset
            )
            self._wire.add("up", "other", request.ByteSize())
            for piece in self._stub.FetchFront(request):
                self._wire.add("down", "other", piece.ByteSize())
                self._check(piece, offset)
                file.write(piece.data)
                offset += len(piece.data)
                progress(offset, self._total_bytes)
            if offset != self._total_bytes:
                raise BundleError(
                    f"{self._party}: the front has {self._total_bytes} bytes, but it sent {offset}"
                )
            file.flush()
            os.fsync(file.fileno())

    def _check(self, piece: model_pb2.FetchFrontResponse, offset: int) -> None:
        if piece.offset_bytes != offset:
            raise OutOfOrder(
                f"{self._party}: byte {offset} of the front is due, got {piece.offset_bytes}"
            )
        if offset + len(piece.data) > self._total_bytes:
            raise TooLarge(f"{self._party}: sent more than the front's {self._total_bytes} bytes")
        if zlib.crc32(piece.data) != piece.crc32:
            raise BundleError(
                f"{self._party}: the front's piece at byte {offset} was damaged on the way; start "
                "again to go on from there"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Several clients of one machine share a download: one fetches, the others wait for it."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
