"""What the client is doing, for its owner: shared by the training loop, the bar and the API."""

import time
from dataclasses import dataclass, field

from pydantic import BaseModel

from lesft_client.wire import WireCounter


class StatusBody(BaseModel):
    """Answer of GET /v1/status."""

    client_id: str
    run_id: str
    phase: str
    round: int
    rounds: int
    loss: float | None
    loss_by_round: list[float]
    adapter_version: int
    num_samples: int
    skipped_samples: int
    tokens: int
    tokens_per_second: float
    bytes_up: int
    bytes_down: int
    seconds_left: float | None


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
    loss_by_round: list[float] = field(default_factory=list)
    training_since: float | None = None
    training_until: float | None = None

    def training_seconds(self) -> float:
        """Seconds from the start of the first round to the end of the last, or to now."""
        if self.training_since is None:
            return 0.0
        return (self.training_until or time.monotonic()) - self.training_since

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
            round=len(self.loss_by_round),
            rounds=self.rounds,
            loss=self.loss_by_round[-1] if self.loss_by_round else None,
            loss_by_round=self.loss_by_round,
            adapter_version=self.adapter_version,
            num_samples=self.num_samples,
            skipped_samples=self.skipped_samples,
            tokens=self.tokens,
            tokens_per_second=self.tokens / seconds if seconds else 0.0,
            bytes_up=self.wire.total("up"),
            bytes_down=self.wire.total("down"),
            seconds_left=self.seconds_left(),
        )
