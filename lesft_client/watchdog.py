"""Notices that a service has fallen silent, where gRPC would wait on."""

import threading
import time
from collections.abc import Callable
from types import TracebackType


class Watchdog:
    """Calls `bite`, once and in a thread of its own, when it was not fed for so many seconds."""

    def __init__(self, seconds: float, bite: Callable[[], object]) -> None:
        """Starts to watch at once."""
        self.seconds = seconds
        self.bitten = False
        self._bite = bite
        self._fed = time.monotonic()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def feed(self) -> None:
        """Something was heard."""
        self._fed = time.monotonic()

    def stop(self) -> None:
        """Watch no more; it does not bite after this."""
        with self._lock:
            self._stopped.set()

    def _watch(self) -> None:
        while (left := self._fed + self.seconds - time.monotonic()) > 0:
            if self._stopped.wait(left):
                return
        with self._lock:
            if not self._stopped.is_set():
                self.bitten = True
                self._bite()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
