"""How long the phases of a step take: as a histogram for the metrics, and as spans of traces."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from prometheus_client import Histogram

from lesft.tracing import Attribute, record_span, record_whole

Phase = Literal["decode", "cohort_wait", "back", "encode", "ledger", "checkpoint", "send"]
"""From a client's bundle being whole to its answer being sent; `back` is forward and backward."""

_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class StepClock:
    """Safe to use from any thread; an observation takes microseconds and waits for nobody."""

    def __init__(self, run_fingerprint: str) -> None:
        self._run = run_fingerprint
        self.seconds = Histogram(
            "lesft_server_step_seconds",
            "Seconds of each phase of a step: decode and send once a client, the others once a "
            "step; checkpoint once a checkpoint.",
            ["phase"],
            buckets=_BUCKETS,
            registry=None,
        )
        for phase in get_args(Phase):
            self.seconds.labels(phase)

    @contextmanager
    def phase(self, phase: Phase, round_index: int, **attributes: Attribute) -> Iterator[None]:
        """The block as a phase; one that fails counts, too."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.since(phase, round_index, started, **attributes)

    def since(
        self, phase: Phase, round_index: int, started: float, **attributes: Attribute
    ) -> None:
        """A phase that began at `started` of `time.monotonic` and ends now."""
        self.between(phase, round_index, started, time.monotonic(), **attributes)

    def between(
        self, phase: Phase, round_index: int, started: float, ended: float, **attributes: Attribute
    ) -> None:
        """A phase that is over; times are of `time.monotonic`."""
        self.seconds.labels(phase).observe(ended - started)
        attributes = {"round": round_index, **attributes}
        started_ns, ended_ns = _wall_ns(started), _wall_ns(ended)
        record_span(phase, self._run, round_index, started_ns, ended_ns, None, **attributes)

    def round_done(self, round_index: int, seconds: float) -> None:
        """The round itself, of which the phases are parts."""
        started_ns = time.time_ns() - int(seconds * 1e9)
        record_whole("round", self._run, round_index, started_ns, round=round_index)


def _wall_ns(moment: float) -> int:
    """A moment of `time.monotonic` as one of `time.time_ns`."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)
