"""Where the time of the thread that owns the model goes: every second of it has one state."""

import threading
from typing import Literal, get_args

from prometheus_client import Counter

State = Literal["keep", "idle", "cohort_wait", "queue", "back"]
"""In the order in which they come between two steps.

- keep: a round's answers and checkpoint go to disk, before which the next one must not begin
- idle: no client has handed in its part of the next step
- cohort_wait: some have, others not yet
- queue: all have, and the model does something else: texts, held-out samples, an operator's pause
- back: forward, backward and at a round's end the optimizer's step
"""

STATES: tuple[State, ...] = get_args(State)


class DeviceAccount:
    """Steps are noted on the device's thread, one after another; the rest from any thread."""

    def __init__(self) -> None:
        self.counter = Counter(
            "lesft_server_device_seconds",
            "Seconds of training by what the model did or waited for; they add up to all of it.",
            ["state"],
            registry=None,
        )
        for state in STATES:
            self.counter.labels(state)
        self._lock = threading.Lock()
        self._round: dict[State, float] = dict.fromkeys(STATES, 0.0)
        self._until: float | None = None
        self._kept = 0.0

    def begin(self, now: float) -> None:
        """Training begins or goes on, if it is not under way; times are of `time.monotonic`."""
        with self._lock:
            self._until = now if self._until is None else self._until

    def kept(self, now: float) -> None:
        """The answers of a step are on disk, and its checkpoint."""
        with self._lock:
            self._kept = now

    def step(
        self,
        begins_round: bool,
        first_part: float,
        complete: float,
        began: float,
        ended: float,
    ) -> tuple[float, float]:
        """A step whose parts came from `first_part` to `complete`, and that ran from `began` on.

        Returns from when to when the model waited for parts, having some.
        """
        with self._lock:
            moment = self._until if self._until is not None else first_part
            ends = {
                "keep": self._kept if begins_round else moment,
                "idle": first_part,
                "cohort_wait": complete,
                "queue": began,
                "back": ended,
            }
            spans: dict[State, tuple[float, float]] = {}
            for state in STATES:
                end = max(moment, ends[state])
                self._round[state] += end - moment
                self.counter.labels(state).inc(end - moment)
                spans[state] = moment, end
                moment = end
            self._until = moment
            return spans["cohort_wait"]

    def round_done(self) -> dict[str, float]:
        """Seconds by state since the round before was done."""
        with self._lock:
            seconds, self._round = self._round, dict.fromkeys(STATES, 0.0)
            return {str(state): value for state, value in seconds.items()}
