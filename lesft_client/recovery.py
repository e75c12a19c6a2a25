"""What the client keeps so that it can go on after a crash: its checkpoints and its instance."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lesft.adapter_halves import ADAPTER_FILE, SPEC_FILE
from lesft.checkpoints import Checkpoint, CheckpointStore
from lesft.errors import InvalidInput
from lesft.files import when_there_is_room, write_atomically
from lesft.wire import WireCounter
from lesft_client.data import EncodedSample
from lesft_client.status import RESULT_FILE, Status

ADAPTER_FOLDER = "adapter"
"""Of a run without a server: the whole model's."""

CHECKPOINTS_FOLDER = "checkpoints"
INSTANCE_FILE = "instance"


class ClientCheckpoints:
    """The checkpoints of one client in one run: its tensors, and with them its status."""

    def __init__(
        self,
        state: Path,
        run_fingerprint: str,
        samples: Sequence[EncodedSample],
        status: Status,
        wire: WireCounter,
        on_wait: Callable[[str], None],
    ) -> None:
        """`on_wait` hears why a checkpoint has to wait, and "" when it is over.

        Raises InvalidInput when the folder holds another run.
        """
        self._state = state
        self._store = CheckpointStore(state / CHECKPOINTS_FOLDER, run_fingerprint)
        self._data = _fingerprint(samples)
        self._status = status
        self._wire = wire
        self._on_wait = on_wait
        self.carried: dict[str, Any] = {}
        """Facts of the caller's that every checkpoint holds, as JSON."""

    def rounds(self) -> list[int]:
        """The rounds that there is an undamaged checkpoint of, in order."""
        return self._store.rounds()

    def save(self, round_index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `lesft_client.trainer.Keeper`. Waits while the disk is full."""
        facts = {
            "client_id": self._status.client_id,
            "data_sha256": self._data,
            "adapter_version": self._status.adapter_version,
            "loss_by_round": self._status.loss_by_round,
            "nll_by_round": self._status.nll_by_round,
            "class_counts_by_round": self._status.class_counts_by_round,
            "tokens": self._status.tokens,
            "training_seconds": self._status.training_seconds(),
            "wire": self._wire.by_kind(),
            "carried": self.carried,
        }
        checkpoint = Checkpoint(round_index, tensors, facts)
        when_there_is_room(lambda: self._store.save(checkpoint), self._state, self._on_wait)

    def load(self, round_index: int) -> Mapping[str, torch.Tensor]:
        """See `lesft_client.trainer.Keeper`. The adapter's version goes back with it."""
        checkpoint = self._store.load(round_index)
        self._store.drop_after(round_index)
        self._status.adapter_version = checkpoint.facts["adapter_version"]
        return checkpoint.tensors

    def restore_status(self, round_index: int) -> None:
        """Go on, in a new process, where the status of a checkpoint stands.

        Raises InvalidInput when the client's name or data are not what they were.
        """
        facts = self._store.load(round_index).facts
        name, data = facts["client_id"], facts["data_sha256"]
        if name != self._status.client_id:
            raise InvalidInput(
                f"--state {self._state} belongs to client {name!r}, not to "
                f"{self._status.client_id!r}: use another folder, or --client-id {name}"
            )
        if data != self._data:
            raise InvalidInput(
                f"--state {self._state}: the training samples are not those that the run began "
                "with: give the same --data, --data-seed, --samples, --share and --skew, or start "
                "anew with --fresh"
            )
        self._status.loss_by_round = facts["loss_by_round"]
        self._status.nll_by_round = facts["nll_by_round"]
        self._status.class_counts_by_round = [
            tuple(counts) if counts else None for counts in facts["class_counts_by_round"]
        ]
        self._status.tokens = facts["tokens"]
        self._status.seconds_before = facts["training_seconds"]
        self._wire.add_all(facts["wire"])
        self.carried = facts["carried"]


def instance_id(state: Path, samples: Sequence[EncodedSample]) -> str:
    """A random name that stays with a state folder and its training samples.

    The server keeps what it holds of a client under this name: with other samples it is another.
    """
    path, data = state / INSTANCE_FILE, _fingerprint(samples)
    if path.exists():
        name, _, data_then = path.read_text().partition(" ")
        if data_then == data:
            return name
    name = secrets.token_hex(16)
    write_atomically(path, f"{name} {data}".encode())
    return name


def drop_state(state: Path) -> None:
    """Forget what an earlier run left in a state folder."""
    for folder in (CHECKPOINTS_FOLDER, ADAPTER_FOLDER):
        shutil.rmtree(state / folder, ignore_errors=True)
    for file in (INSTANCE_FILE, ADAPTER_FILE, SPEC_FILE, RESULT_FILE):
        (state / file).unlink(missing_ok=True)


def _fingerprint(samples: Sequence[EncodedSample]) -> str:
    text = json.dumps([asdict(sample) for sample in samples], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
