"""How long a round takes that a device, a link and a server have a part in.

Within an accumulation window the device goes forward with later micro-batches while earlier ones
are sent, computed or sent back: a pipeline of four stages, each of which takes one micro-batch at a
time, and of which the device is the first and the last.
"""

import math
from collections import deque

from pydantic import BaseModel, ConfigDict


class Stages(BaseModel):
    """Seconds of one micro-batch in each stage, and those that come once a round."""

    model_config = ConfigDict(frozen=True)

    forward: float
    up: float
    server: float
    down: float
    backward: float
    round_trip: float
    """What the link takes however little is sent, there and back."""
    optimizer: float
    """Once a round, on the device."""
    aggregation: float
    """Once a round: what comes once an aggregation interval, divided by its rounds."""

    def busy(self, accumulation: int, in_flight: int) -> dict[str, float]:
        """Seconds of a round that each part is busy, or that must pass because of it."""
        return {
            "device": accumulation * (self.forward + self.backward) + self.optimizer,
            "uplink": accumulation * self.up,
            "server": accumulation * self.server,
            "downlink": accumulation * self.down,
            "round trip": math.ceil(accumulation / in_flight) * self.round_trip,
        }

    def bottleneck(self, accumulation: int, in_flight: int) -> str:
        """What a round waits for most."""
        busy = self.busy(accumulation, in_flight)
        return max(busy, key=lambda name: busy[name])


def round_seconds(stages: Stages, accumulation: int, in_flight: int) -> float:
    """Seconds of a round, gone through as `Trainer._train_round` does."""
    device = up = server = down = 0.0  # when each is free again
    gradients: deque[float] = deque()  # when they arrive
    for _ in range(accumulation):
        if len(gradients) == in_flight:
            device = max(device, gradients.popleft()) + stages.backward
        device += stages.forward
        up = max(up, device) + stages.up
        server = max(server, up + stages.round_trip / 2) + stages.server
        down = max(down, server) + stages.down
        gradients.append(down + stages.round_trip / 2)
    while gradients:
        device = max(device, gradients.popleft()) + stages.backward
    return device + stages.optimizer + stages.aggregation
