"""What the client is doing, for its owner: shared by the training loop, the bar and the API."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from lesft.micro_batch import StepResult, sum_class_counts
from lesft.wire import Direction, Kind, WireCounter

RESULT_FILE = "result.json"
"""In the state folder: what is left of the status, and more figures, once the run is finished."""


class StatusFigures(BaseModel):
    """The client's figures as they are now."""

    client_id: str
    run_id: str
    phase: str
    waiting_for: str
    reconnects: int
    round: int
    rounds: int
    loss: float | None
    adapter_version: int
    num_samples: int
    skipped_samples: int
    tokens: int
    tokens_per_second: float
    bytes_up: int
    bytes_down: int
    wire: dict[Direction, dict[Kind, int]]
    """Bytes on the wire by kind, up and down."""
    seconds_left: float | None
    seconds_by_phase: dict[str, float]
    """Of this process's training loop; together, all of its time."""


class StatusBody(StatusFigures):
    """Answer of GET /v1/status."""

    loss_by_round: list[float | None]
    """None for rounds that went on without this client."""
    nll_by_round: list[float | None]
    """Mean -log P per target token of its micro-batches, in nats, with dropout."""
    class_counts_by_round: list[tuple[int, int, int] | None]
    """Its salient, sub-salient and irrelevant target tokens; None where there are no classes."""


@dataclass
class Status:
    """Written by the training loop alone, read by everybody."""

    client_id: str
    wire: WireCounter
    phase: str = "starting"
    run_id: str = ""
    rounds: int = 0
    num_samples: int = 0
    skipped_samples: int = 0
    adapter_version: int = 0
    tokens: int = 0
    """Tokens sent through the front for training, on both paths."""
    loss_by_round: list[float | None] = field(default_factory=list)
    nll_by_round: list[float | None] = field(default_factory=list)
    class_counts_by_round: list[tuple[int, int, int] | None] = field(default_factory=list)
    waiting_for: str = ""
    """What the run waits for, in words."""
    reconnects: int = 0
    """How often this process had to connect to the server again."""
    seconds_before: float = 0.0
    """Training time of what is done, but for the stretch since `_training_since`."""
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    """Of this process's training loop."""
    in_flight: int = 0
    """Micro-batches that were sent and not answered yet."""
    _training_since: float | None = None

    def round_done(self, results: Sequence[StepResult]) -> None:
        """Note what came of a round's micro-batches."""
        self.loss_by_round.append(sum(result.loss for result in results) / len(results))
        self.nll_by_round.append(sum(result.nll for result in results) / len(results))
        self.class_counts_by_round.append(sum_class_counts(results))

    def go_to_round(self, round_index: int) -> None:
        """Forget the rounds from this one on; those before it that are missing were missed."""
        for figures in (self.loss_by_round, self.nll_by_round, self.class_counts_by_round):
            del figures[round_index:]
            figures += [None] * (round_index - len(figures))

    def reconnected(self) -> None:
        """Count a connection to the server that was made again."""
        self.reconnects += 1

    def training_begins(self) -> None:
        """The clock runs."""
        self._training_since = time.monotonic()

    def training_ends(self) -> None:
        """The clock stops."""
        self.seconds_before, self._training_since = self.training_seconds(), None

    def training_seconds(self) -> float:
        """Seconds spent in the training loop so far, waiting included."""
        if self._training_since is None:
            return self.seconds_before
        return self.seconds_before + time.monotonic() - self._training_since

    def seconds_left(self) -> float | None:
        """Estimate from the mean round so far; None before the first round's end."""
        done = len(self.loss_by_round)
        if not done:
            return None
        return self.training_seconds() / done * (self.rounds - done)

    def body(self) -> StatusBody:
        """A snapshot."""
        seconds = self.training_seconds()
        return StatusBody(
            client_id=self.client_id,
            run_id=self.run_id,
            phase=self.phase,
            waiting_for=self.waiting_for,
            reconnects=self.reconnects,
            round=len(self.loss_by_round),
            rounds=self.rounds,
            loss=self.loss_by_round[-1] if self.loss_by_round else None,
            loss_by_round=self.loss_by_round,
            nll_by_round=self.nll_by_round,
            class_counts_by_round=self.class_counts_by_round,
            adapter_version=self.adapter_version,
            num_samples=self.num_samples,
            skipped_samples=self.skipped_samples,
            tokens=self.tokens,
            tokens_per_second=self.tokens / seconds if seconds else 0.0,
            bytes_up=self.wire.total("up"),
            bytes_down=self.wire.total("down"),
            wire=self.wire.by_kind(),
            seconds_left=self.seconds_left(),
            seconds_by_phase=dict(self.seconds_by_phase),
        )
