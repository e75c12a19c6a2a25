"""Checkpoints of one party's training state: whole or not there, the last two kept.

A checkpoint is a folder `round-N`: `tensors.safetensors` and `checkpoint.json`, which names the run
it belongs to and holds the checksum of the tensors and of its own facts. It is written beside,
forced to disk and renamed into place, so that a crash at any moment leaves the ones before it. What
is there and does not match its checksums was damaged later; it is passed over, which the log says.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lesft.errors import InvalidInput
from lesft.files import sync_folder, write_and_sync

log = logging.getLogger(__name__)

KEPT = 2
"""A crash while one is being written, or damage to one, must leave another."""

TENSORS_FILE = "tensors.safetensors"
FACTS_FILE = "checkpoint.json"
_FORMAT = 1
_NAME = re.compile(r"round-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A party's state before the first step of `round` (counted from 0)."""

    round: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    """Whatever else the party needs, as JSON."""


class CheckpointStore:
    """The checkpoints of one run in one folder. One thread at a time may save."""

    def __init__(self, folder: Path, run_fingerprint: str) -> None:
        """Clears away what a crash left half written.

        Raises InvalidInput when the folder holds checkpoints of another run.
        """
        self._folder = folder
        self._run_fingerprint = run_fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".*.tmp"):
            shutil.rmtree(left_over)
        self._good = {index for index in self._on_disk() if self._read(index) is not None}

    def rounds(self) -> list[int]:
        """The rounds that there is an undamaged checkpoint of, in order."""
        return sorted(self._good)

    def load(self, round_index: int) -> Checkpoint:
        """One of `rounds`. Raises InvalidInput when it was damaged meanwhile."""
        checkpoint = self._read(round_index)
        if checkpoint is None:
            raise InvalidInput(f"{self._path(round_index)} has been damaged since it was checked")
        return checkpoint

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint: on disk for good when this returns. Drops all but the last two.

        Raises OSError when it cannot be written: then the earlier ones are as they were.
        """
        path = self._path(checkpoint.round)
        temporary = path.with_name(f".{path.name}.new.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            tensors = save(dict(checkpoint.tensors))
            write_and_sync(temporary / TENSORS_FILE, tensors)
            write_and_sync(temporary / FACTS_FILE, self._facts_file(checkpoint, tensors))
            sync_folder(temporary)
            if path.exists():  # the same round again, after going back to an earlier one
                self._drop(checkpoint.round)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk is not to fill with halves
            raise
        sync_folder(self._folder)
        self._good.add(checkpoint.round)
        self.drop_after(checkpoint.round)
        for old in self.rounds()[:-KEPT]:
            self._drop(old)
        for damaged in set(self._on_disk()) - self._good:
            self._drop(damaged)

    def drop_after(self, round_index: int) -> None:
        """Drop those of later rounds: of a course that the run has gone back from."""
        for later in self._on_disk():
            if later > round_index:
                self._drop(later)

    # ------------------------------------------------------------------ its pieces

    def _path(self, round_index: int) -> Path:
        return self._folder / f"round-{round_index:06d}"

    def _on_disk(self) -> list[int]:
        names = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        return sorted(int(name[1]) for name in names if name)

    def _drop(self, round_index: int) -> None:
        self._good.discard(round_index)
        path = self._path(round_index)
        # Renamed first: half a checkpoint must not be taken for a damaged one.
        doomed = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)

    def _facts_file(self, checkpoint: Checkpoint, tensors: bytes) -> bytes:
        body = {
            "format": _FORMAT,
            "round": checkpoint.round,
            "run_fingerprint": self._run_fingerprint,
            "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
            "facts": checkpoint.facts,
        }
        return json.dumps({**body, "sha256": _digest(body)}).encode()

    def _read(self, round_index: int) -> Checkpoint | None:
        path = self._path(round_index)
        try:
            body = dict(json.loads((path / FACTS_FILE).read_bytes()))
            if body.pop("sha256") != _digest(body) or body["format"] != _FORMAT:
                raise ValueError(f"{FACTS_FILE} does not match its checksum")
            if body["round"] != round_index:
                raise ValueError(f"it is that of round {body['round']}")
            if body["run_fingerprint"] != self._run_fingerprint:
                raise InvalidInput(
                    f"{path} belongs to a run with other settings: use another --state, or "
                    "--fresh to drop it and start anew"
                )
            data = (path / TENSORS_FILE).read_bytes()
            if hashlib.sha256(data).hexdigest() != body["tensors_sha256"]:
                raise ValueError(f"{TENSORS_FILE} does not match its checksum")
            return Checkpoint(round_index, load(data), body["facts"])
        except InvalidInput:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("%s is damaged and passed over: %s", path, error)
            return None


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
