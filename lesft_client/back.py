"""How the training loop talks to the back of the model: over gRPC, or in this process."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from lesft.back import Back
from lesft.cohort_batch import Part
from lesft.micro_batch import MicroBatch, Path, StepResult, Targets
from lesft.sample_memory import ClientMemory


class Turn(Exception):
    """The back goes on at another round than the loop: what is in flight is void.

    Any call of a link may raise it. Do what its kind says, `resume` the link there, go on.
    """

    def __init__(self, round_index: int) -> None:
        super().__init__(f"go on at round {round_index}")
        self.round = round_index


class GoBack(Turn):
    """The back stands at an earlier round: load the checkpoint of `round`."""


class Rejoin(Turn):
    """The others have gone on without this client: take the average that `round` begins with."""


class BackLink(Protocol):
    """The back as the training loop sees it; see `lesft_client.link.ServerLink` for gRPC."""

    def open(self) -> Turn:
        """Begin; returns where, for `resume`."""

    def resume(self, round_index: int) -> None:
        """Go on from the beginning of a round; see `Turn`."""

    def holds(self, sample: int) -> bool:
        """Whether the back has a sample, by its number, so that it need not be enclosed."""

    def send(self, batch: MicroBatch) -> None:
        """Hand in a micro-batch; does not wait for its result."""

    def receive(self) -> StepResult:
        """The result of the oldest micro-batch that has none yet; waits for it."""

    def waited_for(self, seconds: float) -> Mapping[str, float]:
        """Where the last `seconds` of the micro-batch went that was received last, by phase.

        What is not known of it is left out.
        """

    def score(self, base: Path, targets: Targets) -> list[float]:
        """Each held-out sample's sum of -log P over its target tokens, in nats."""

    def check(self) -> None:
        """Raises what `receive` would raise instead of an answer."""

    def leave(self, reason: str) -> None:
        """End the session: `reason` is empty after the last round."""


class LocalBack:
    """The back in this process, for a client that holds the whole model."""

    def __init__(
        self, back: Back, client_id: str, checkpoint_rounds: Callable[[], list[int]] = list
    ) -> None:
        """`checkpoint_rounds` are the rounds at which it can be gone on."""
        self._back = back
        self._client_id = client_id
        self._checkpoint_rounds = checkpoint_rounds
        self._results: deque[StepResult] = deque()

    @property
    def _memory(self) -> ClientMemory:
        return self._back.memory.of(self._client_id, instance_id="")

    def open(self) -> Turn:
        """At the newest checkpoint, or the beginning."""
        return GoBack(max(self._checkpoint_rounds(), default=0))

    def resume(self, round_index: int) -> None:
        """Nothing is in flight here."""

    def holds(self, sample: int) -> bool:
        """Whether it remembers a sample's targets and reference probabilities."""
        return sample in self._memory

    def send(self, batch: MicroBatch) -> None:
        """Run the step at once."""
        memory = self._memory if self._back.spec.names_samples else None
        if memory is not None:
            batch = memory.complete(batch)
        part = Part(self._client_id, batch, share=1.0, memory=memory)
        checkpoint = self._back.spec.ends_interval(batch.key.round)
        self._results.extend(
            replace(result, checkpoint=checkpoint)
            for result in self._back.train_step(batch.key, [part])
        )

    def receive(self) -> StepResult:
        """The oldest result that was not taken yet."""
        return self._results.popleft()

    def waited_for(self, seconds: float) -> Mapping[str, float]:
        """Nothing is waited for: the step was taken when its micro-batch was sent."""
        return {}

    def score(self, base: Path, targets: Targets) -> list[float]:
        """See `BackLink`."""
        return self._back.score(base, targets)

    def check(self) -> None:
        """Nothing comes between."""

    def leave(self, reason: str) -> None:
        """Nothing to end."""
