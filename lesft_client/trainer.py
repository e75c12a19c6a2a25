"""The client's training loop: METHOD section 3, steps 1, 2 and 7 to 10. No gRPC here."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lesft.adapters import layer_of
from lesft.errors import HandshakeMismatch, StaleVersion
from lesft.logs import note
from lesft.micro_batch import StepKey, StepResult
from lesft.spec import RunSpec
from lesft.tracing import Attribute, span
from lesft_client.back import BackLink, Rejoin, Turn
from lesft_client.data import EncodedSample, sample_index
from lesft_client.front import ForwardPass, Front
from lesft_client.status import Status

log = logging.getLogger(__name__)

_AVERAGE = "average."
"""What the names of the last average's tensors in a checkpoint begin with."""


@dataclass(frozen=True)
class Average:
    """A version of the averaged adapter: its number, and its tensors where they are kept.

    They are where adapters travel as changes. Version 0, with which the run begins, has none.
    """

    version: int
    tensors: Mapping[str, torch.Tensor]


BEGINNING = Average(0, {})


class AggregatorLink(Protocol):
    """The aggregator as the training loop sees it; see `lesft_client.aggregation`."""

    def submit(
        self, base: Average, state: Mapping[str, torch.Tensor], receipt: bytes = b""
    ) -> None:
        """Hand in this client's adapter, trained from `base`.

        `receipt` is the server's word on that; see `StepResult`.
        """

    def fetch(
        self, version: int, like: Mapping[str, torch.Tensor], base: Average
    ) -> dict[str, torch.Tensor]:
        """Wait for a version of the averaged adapter; `base` is the one that this client has."""


class Keeper(Protocol):
    """Where checkpoints go; see `lesft_client.recovery.ClientCheckpoints`."""

    def save(self, round_index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the state before a round; it would survive a power cut when this returns."""

    def load(self, round_index: int) -> Mapping[str, torch.Tensor]:
        """The state before a round, one that was saved."""


Explanation = Callable[[float], Mapping[str, float]]
"""Of the seconds that a phase took, those that other phases are better names for."""


@dataclass
class PhaseTimer:
    """Seconds by phase of the loop; together, those of the loop, but for what is between."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, explanation: Explanation | None = None) -> Iterator[None]:
        """Count the block's time for a phase; where it ends well, as its explanation says."""
        start, known = time.monotonic(), dict[str, float]()
        try:
            yield
            if explanation is not None:
                known = dict(explanation(time.monotonic() - start))
        finally:
            rest = max(0.0, time.monotonic() - start - sum(known.values()))
            for each, seconds in {name: rest, **known}.items():
                self.seconds[each] = self.seconds.get(each, 0.0) + seconds


class Trainer:
    """One client's side of a run, from its first round to its last."""

    def __init__(
        self,
        front: Front,
        back: BackLink,
        aggregator: AggregatorLink | None,
        samples: Sequence[EncodedSample],
        status: Status,
        in_flight: int = 0,
        keeper: Keeper | None = None,
    ) -> None:
        """`in_flight` bounds the micro-batches sent ahead; 0 takes the whole window.

        Without an `aggregator` this client's adapter stays its own, whatever the spec says. Without
        a `keeper` there are no checkpoints to go back to.
        """
        self._front = front
        self._back = back
        self._aggregator = aggregator
        self._samples = samples
        self._status = status
        self._spec: RunSpec = front.spec
        self._max_in_flight = in_flight or self._spec.accumulation
        self._keeper = keeper
        self.round = 0
        """The round to train next, counted from 0."""
        self.timer = PhaseTimer(status.seconds_by_phase)
        self._run_fingerprint = self._spec.fingerprint()
        self._kept_average: Mapping[str, torch.Tensor] = {}

    # ------------------------------------------------------------------ the training step

    def train(self, on_round: Callable[[], None] = lambda: None) -> None:
        """All rounds that are left; `on_round` is called after each.

        Raises Turn when the server goes on at another round: `turn` there and train on.
        """
        self._status.training_begins()
        try:
            while self.round < self._spec.rounds:
                note(round=self.round)
                results = self._train_round(self.round)
                if self._aggregator is not None and self._spec.aggregates_after(self.round):
                    self._aggregate(self._aggregator, results[-1].receipt)
                self._status.round_done(results)
                self.round += 1
                if results[-1].checkpoint:
                    self.save()
                on_round()
        finally:
            self._status.training_ends()

    def _train_round(self, round_index: int) -> list[StepResult]:
        """One accumulation window and its optimizer step.

        The adapters do not change within the window, so later micro-batches go forward while the
        gradients of earlier ones are on their way: the same numbers, and the latency is hidden.
        """
        self._status.in_flight = 0
        in_flight: deque[ForwardPass] = deque()
        results: list[StepResult] = []
        for micro in range(self._spec.accumulation):
            key = StepKey(round_index, micro)
            numbers = self._draw(key)
            while in_flight and (
                len(in_flight) == self._max_in_flight or _on_their_way(numbers, in_flight)
            ):
                results.append(self._finish(in_flight.popleft()))
            in_flight.append(self._start(key, numbers))
        while in_flight:
            results.append(self._finish(in_flight.popleft()))
        if self._spec.train_front:
            with self._phase("optimizer", round_index):
                self._front.step(round_index)
        return results

    def _start(self, key: StepKey, numbers: Sequence[int]) -> ForwardPass:
        """Steps 1 and 2: go forward on both paths with a mini-batch, upload."""
        with self._phase("front_forward", key.round, micro=key.micro):
            samples = [self._samples[n] for n in numbers]
            if not self._spec.names_samples:
                forward = self._front.forward(key, samples)
            else:
                enclosed = self._enclosed(key, numbers)
                if self._spec.train_front:
                    forward = self._front.forward(key, samples, numbers, enclosed)
                else:
                    forward = self._front.forward_frozen(key, numbers, enclosed)
        with self._phase("send", key.round, micro=key.micro):
            self._back.send(forward.micro_batch)
        self._status.in_flight += 1
        return forward

    def _enclosed(self, key: StepKey, numbers: Sequence[int]) -> dict[int, EncodedSample]:
        """The samples that the back does not hold, or whose reference path is due anew."""
        enclosed = {}
        for position, number in enumerate(numbers, start=self._first_position(key)):
            epoch = position // len(self._samples)
            if self._spec.loss.forgets_before(epoch) or not self._back.holds(number):
                enclosed[number] = self._samples[number]
        return enclosed

    def _finish(self, forward: ForwardPass) -> StepResult:
        """Step 7: wait for the gradient and go backward. Returns what came back."""
        batch, key = forward.micro_batch, forward.micro_batch.key
        waiting = self._phase(
            "waiting_for_gradient", key.round, explanation=self._back.waited_for, micro=key.micro
        )
        with waiting:
            result = self._back.receive()
        self._status.in_flight -= 1
        if self._spec.train_front:
            with self._phase("front_backward", key.round, micro=key.micro):
                self._front.backward(forward, result)
        self._status.tokens += sum(batch.base.lengths)
        self._status.tokens += sum(batch.reference.lengths) if batch.reference else 0
        return result

    def _aggregate(self, aggregator: AggregatorLink, receipt: bytes) -> None:
        """Steps 8 to 10: hand in Θ_i, wait for Θ̄ and go on from it.

        Personal layers take no part: they stay as this client has trained them.
        """
        version = self._status.adapter_version
        links_to = (self._spec.run_id, version)
        with self._phase("aggregation", self.round, links_to, base_version=version):
            try:
                aggregator.submit(self._average, self._shared(self._front.adapter()), receipt)
            except StaleVersion:
                if self._spec.mode == "lockstep":
                    raise
                log.warning("version %d was averaged without this client", version + 1)
            self._take_average(aggregator, version + 1)

    def _take_average(self, aggregator: AggregatorLink, version: int) -> None:
        state = self._front.adapter()
        average = aggregator.fetch(version, self._shared(state), self._average)
        self._front.load_adapter({**state, **average})
        self._status.adapter_version = version
        self._kept_average = average if self._spec.adapter_encoding != "raw" else {}

    @property
    def _average(self) -> Average:
        """What this client trains from."""
        return Average(self._status.adapter_version, self._kept_average)

    def _shared(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Θ_i without its personal layers."""
        personal = set(self._spec.personal_layers)
        return {name: tensor for name, tensor in state.items() if layer_of(name) not in personal}

    @contextmanager
    def _phase(
        self,
        name: str,
        round_index: int,
        links_to: tuple[str, int] | None = None,
        explanation: Explanation | None = None,
        **attributes: int,
    ) -> Iterator[None]:
        """Time a part of a round, for the figures and for traces."""
        named: dict[str, Attribute] = {"client": self._status.client_id, "round": round_index}
        named |= attributes
        with (
            self.timer.phase(name, explanation),
            span(name, self._run_fingerprint, round_index, links_to, **named),
        ):
            yield

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Keep a checkpoint of the state before the next round."""
        if self._keeper is not None:
            with self._phase("checkpoints", self.round - 1):
                kept = {f"{_AVERAGE}{name}": each for name, each in self._kept_average.items()}
                self._keeper.save(self.round, {**self._front.state(), **kept})

    def turn(self, turn: Turn) -> None:
        """Go on where the server does; what was begun since is void."""
        if isinstance(turn, Rejoin):
            self.rejoin(turn.round)
        else:
            self.go_back(turn.round)

    def restore(self, round_index: int) -> None:
        """Load the checkpoint of a round."""
        assert self._keeper is not None, "without checkpoints there is nothing to go back to"
        tensors = self._keeper.load(round_index)
        kept = {name for name in tensors if name.startswith(_AVERAGE)}
        self._kept_average = {name.removeprefix(_AVERAGE): tensors[name] for name in kept}
        self._front.load_state({name: tensors[name] for name in tensors.keys() - kept})
        self.round = round_index
        self._status.go_to_round(round_index)

    def go_back(self, round_index: int) -> None:
        """Go on from the checkpoint of a round."""
        self.restore(round_index)
        self._back.resume(round_index)

    def rejoin(self, round_index: int) -> None:
        """Go on from the average that a round begins with, having missed some of those before."""
        self._back.resume(round_index)
        self._front.drop_gradients()
        before, now = (self._spec.aggregations_before(r) for r in (self.round, round_index))
        if now < before:
            raise HandshakeMismatch(
                f"round: the others go on at round {round_index}, this client stands at "
                f"{self.round} and has no checkpoint of theirs; start it anew with --fresh"
            )
        if self._aggregator is not None and now > before:
            version = self._status.adapter_version + now - before
            self._take_average(self._aggregator, version)
        self._status.go_to_round(round_index)
        self.round = round_index

    # ------------------------------------------------------------------ beside training

    def _draw(self, key: StepKey) -> list[int]:
        """The samples of a micro-batch: a function of seed and key, so that it can be replayed."""
        first = self._first_position(key)
        return [
            sample_index(self._spec.seed, self._status.client_id, position, len(self._samples))
            for position in range(first, first + self._spec.batch_size)
        ]

    def _first_position(self, key: StepKey) -> int:
        """Samples that were drawn before a micro-batch, since the run began."""
        return (key.round * self._spec.accumulation + key.micro) * self._spec.batch_size

    def score(self, samples: Sequence[EncodedSample], on_batch: Callable[[], None]) -> "HeldOut":
        """Held-out likelihood of the model as it is; trains nothing."""
        nll_sum, tokens = 0.0, 0
        size = self._spec.batch_size
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            nll_sum += sum(self._back.score(*self._front.held_out(batch)))
            tokens += sum(len(sample.target_ids) for sample in batch)
            on_batch()
        return HeldOut(nll_sum, tokens)


def _on_their_way(numbers: Sequence[int], in_flight: Iterable[ForwardPass]) -> bool:
    """Whether activations of these samples were sent and may be held once they are answered."""
    return any(n in sent.micro_batch.enclosed for sent in in_flight for n in numbers)


@dataclass(frozen=True)
class HeldOut:
    """Sum of -log P over the target tokens of the held-out samples, in nats, and their number."""

    nll_sum: float
    tokens: int
