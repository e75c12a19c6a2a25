"""What the back remembers of clients' samples, so that it need not be sent again: labels and P~.

The reference path serves for nothing but the target tokens' probabilities on it (METHOD section 4),
four bytes a token. Where the run lets them hold for more than one epoch, they are remembered, and
neither side goes along that path again until they are due anew.

What is remembered is part of the training state: a checkpoint holds it, so that a run which goes
back has what it had then. Shape letter: T target tokens of one sample.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lesft.errors import InvalidInput, OutOfOrder
from lesft.micro_batch import MicroBatch, Path, StepKey, Targets

PREFIX = "remembered."
"""What the names of its tensors in a training state begin with."""

_DEFAULT_BYTES = 256 << 20
_OVERHEAD_BYTES = 512
"""Of one sample, beside its tokens."""


@dataclass(frozen=True)
class _Sample:
    """`ids_T` int32, `log_probs_T` float32, both on the CPU; `since` is the step it came with."""

    since: StepKey
    ids_T: torch.Tensor
    log_probs_T: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.ids_T.nbytes + self.log_probs_T.nbytes + _OVERHEAD_BYTES


class SampleMemory:
    """The samples of all clients, within a limit. Safe to use from several threads."""

    def __init__(self, max_bytes: int = _DEFAULT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._clients: dict[str, ClientMemory] = {}
        self.num_bytes = 0
        """Memory in use."""

    def of(self, client_id: str, instance_id: str) -> "ClientMemory":
        """One client's; what is of an earlier instance of it is forgotten."""
        client = self._clients.get(client_id)
        if client is None or client.instance_id != instance_id:
            if client is not None:
                client.drop()
            client = self._clients[client_id] = ClientMemory(self, instance_id)
        return client

    def take(self, num_bytes: int) -> bool:
        """Reserve memory, or give it back where negative; returns whether there was room."""
        with self._lock:
            if num_bytes > 0 and self.num_bytes + num_bytes > self._max_bytes:
                return False
            self.num_bytes += num_bytes
            return True

    def state(self) -> dict[str, torch.Tensor]:
        """All of it as named tensors, for a checkpoint; none of a client without samples here."""
        return {
            f"{PREFIX}{client_id}.{name}": tensor
            for client_id, client in list(self._clients.items())  # a client may join meanwhile
            for name, tensor in client.state().items()
        }

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Know what a `state` knows, and nothing else."""
        self._clients, self.num_bytes = {}, 0
        by_client: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            client_id, _, field = name.removeprefix(PREFIX).rpartition(".")
            by_client.setdefault(client_id, {})[field] = tensor
        for client_id, fields in by_client.items():
            instance_id = bytes(fields["instance"].tolist()).decode()
            self._clients[client_id] = client = ClientMemory(self, instance_id)
            client.load_state(fields)


class ClientMemory:
    """What is remembered of one client's samples, by their numbers in its data."""

    def __init__(self, memory: SampleMemory, instance_id: str) -> None:
        self._memory = memory
        self._samples: dict[int, _Sample] = {}
        self.instance_id = instance_id

    def numbers_before(self, key: StepKey) -> list[int]:
        """The samples that were remembered before a step: a client that replays it asks for them.

        A function of the key alone, whatever has come since, so that the same requests come again.
        """
        return sorted(number for number, sample in self._all() if sample.since < key)

    def among(self, samples: Iterable[int], key: StepKey) -> list[int]:
        """Those of some samples that are remembered once a step is done."""
        return sorted(set(samples).intersection(n for n, s in self._all() if s.since <= key))

    def __contains__(self, number: int) -> bool:
        return number in self._samples

    def check_complete(self, samples: Iterable[int], enclosed: Iterable[int]) -> None:
        """Raises OutOfOrder for a sample that is neither enclosed nor remembered."""
        for number in sorted(set(samples) - set(enclosed) - self._samples.keys()):
            raise OutOfOrder(
                f"sample {number} is not remembered here: enclose its targets and reference path"
            )

    def complete(self, received: MicroBatch) -> MicroBatch:
        """The micro-batch with the targets of all its samples and what is known of them.

        Raises InvalidInput when a sample is shorter than its target was.
        """
        targets = torch.split(received.targets.ids_T, list(received.targets.lengths))
        paths = [] if received.reference is None else _rows(received.reference)
        fresh = dict(zip(received.enclosed, zip(targets, paths, strict=True), strict=True))
        ids: list[torch.Tensor] = []
        known: list[torch.Tensor | None] = []
        references: list[torch.Tensor] = []
        for number, length in zip(received.samples, received.base.lengths, strict=True):
            if number in fresh:
                ids_T, row_ND = fresh[number]
                references.append(row_ND)
                known.append(None)
            else:
                sample = self._samples[number]
                ids_T = sample.ids_T.long()
                known.append(sample.log_probs_T)
            if len(ids_T) >= length:
                raise InvalidInput(
                    f"base_lengths: sample {number} has {length} tokens, but its target alone has "
                    f"{len(ids_T)}"
                )
            ids.append(ids_T)
        return replace(
            received,
            reference=_joined(references) if references else None,
            targets=Targets(torch.cat(ids), tuple(len(ids_T) for ids_T in ids)),
            known_log_probs=tuple(known),
        )

    def keep(self, batch: MicroBatch, log_probs: Sequence[torch.Tensor]) -> None:
        """Remember what a step has found of a `complete` micro-batch's samples, where it is new.

        `log_probs` holds log P~ `[T]` of each sample.
        """
        ids = torch.split(batch.targets.ids_T, list(batch.targets.lengths))
        for number, ids_T, known, log_probs_T in zip(
            batch.samples, ids, batch.known_log_probs, log_probs, strict=True
        ):
            if known is None:
                # Clones: a view would keep the whole batch.
                found = log_probs_T.detach().to("cpu", torch.float32, copy=True)
                self._put(number, _Sample(batch.key, ids_T.to("cpu", torch.int32).clone(), found))

    def drop(self) -> None:
        """Forget it all."""
        samples, self._samples = self._samples, {}
        self._memory.take(-sum(sample.num_bytes for sample in samples.values()))

    def _put(self, number: int, sample: _Sample) -> None:
        before = self._samples.get(number)
        if before is not None:
            sample = replace(sample, since=before.since)
        more_bytes = sample.num_bytes - (before.num_bytes if before else 0)
        if self._memory.take(more_bytes):
            self._samples[number] = sample

    def _all(self) -> list[tuple[int, _Sample]]:
        return list(self._samples.items())  # another thread may be adding to them

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, torch.Tensor]:
        """As named tensors, samples one after another; none where there are no samples."""
        every = self._all()
        samples = [sample for _, sample in every]
        if not samples:
            return {}
        return {
            "instance": torch.tensor(list(self.instance_id.encode()), dtype=torch.uint8),
            "numbers": torch.tensor([number for number, _ in every], dtype=torch.int64),
            "since": torch.tensor([[s.since.round, s.since.micro] for s in samples]),
            "lengths": torch.tensor([len(s.ids_T) for s in samples], dtype=torch.int64),
            "ids": torch.cat([s.ids_T for s in samples]),
            "log_probs": torch.cat([s.log_probs_T for s in samples]),
        }

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Know what a `state` knows."""
        lengths = tensors["lengths"].tolist()
        for number, since, ids_T, log_probs_T in zip(
            tensors["numbers"].tolist(),
            tensors["since"].tolist(),
            torch.split(tensors["ids"], lengths),
            torch.split(tensors["log_probs"], lengths),
            strict=True,
        ):
            self._put(number, _Sample(StepKey(*since), ids_T.clone(), log_probs_T.clone()))


def _rows(path: Path) -> list[torch.Tensor]:
    return list(torch.split(path.activations_ND, list(path.lengths)))


def _joined(rows: Sequence[torch.Tensor]) -> Path:
    return Path(torch.cat(list(rows)), tuple(len(row) for row in rows))
