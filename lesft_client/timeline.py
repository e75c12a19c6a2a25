"""What a micro-batch went through between being handed in and its result: where the time went."""

import math
from dataclasses import dataclass

from lesft.v1 import training_pb2

WAITS = (
    *("wait_encode", "wait_uplink", "wait_server_decode", "wait_queue", "wait_back"),
    *("wait_answer", "wait_downlink", "wait_decode"),
)
"""What the loop may wait for, by the names of its phases."""


@dataclass(frozen=True)
class Moments:
    """Of one micro-batch on one stream: by this process's `time.monotonic`, and by the server."""

    encoding: float
    """Requests before it were on their way, and it began to be encoded."""
    encoded: float
    header: float
    """The first message of its answer was there."""
    whole: float
    """And the last."""
    decoded: float
    server: training_pb2.StepTimes

    def phases(self, handed_in: float) -> list[tuple[str, float]]:
        """Phases and their seconds in order; together, the time from `handed_in` to `decoded`.

        Clocks of two machines are not compared: what neither end accounts for is the way there and
        back, and half of it counts for each.
        """
        times = self.server
        receive, decode, queue = (_seconds(s) for s in (times.receive, times.decode, times.queue))
        back, answer, send = (_seconds(s) for s in (times.back, times.answer, times.send))
        known = receive + decode + queue + back + answer + send
        way = max(0.0, self.header - self.encoded - known) / 2
        return [
            ("wait_uplink", self.encoding - handed_in),
            ("wait_encode", self.encoded - self.encoding),
            ("wait_uplink", receive + way),
            ("wait_server_decode", decode),
            ("wait_queue", queue),
            ("wait_back", back),
            ("wait_answer", answer),
            ("wait_downlink", send + way + self.whole - self.header),
            ("wait_decode", self.decoded - self.whole),
        ]

    def waited_for(self, handed_in: float, seconds: float) -> dict[str, float]:
        """The phases that the last `seconds` lay in: what whoever waited so long has waited for.

        Never more than `seconds` in all.
        """
        found: dict[str, float] = {}
        for name, length in reversed(self.phases(handed_in)):
            share = min(length, seconds)
            if share > 0:
                found[name] = found.get(name, 0.0) + share
                seconds -= share
        return found


def _seconds(value: float) -> float:
    """A duration that another machine has measured, whatever it says."""
    return value if math.isfinite(value) and value > 0 else 0.0
