"""Counts of what was refused or cut down, by reason; for metrics."""

import threading
from collections import Counter
from collections.abc import Mapping


class Refusals:
    """Counted from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def inc(self, reason: str) -> None:
        """One more for a reason, of which there are few: it becomes a label."""
        with self._lock:
            self._counts[reason] += 1

    @property
    def counts(self) -> Mapping[str, int]:
        """So far, by reason."""
        with self._lock:
            return dict(self._counts)
