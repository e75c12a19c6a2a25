"""The watchdog: bites once, when nothing was heard for so long, and never a stopped one's owner."""

import threading
import time

from lesft_client.watchdog import Watchdog

SECONDS = 20


def test_it_bites_once_when_it_is_not_fed() -> None:
    bites: list[float] = []
    bitten = threading.Event()

    def bite() -> None:
        bites.append(time.monotonic())
        bitten.set()

    start = time.monotonic()
    watchdog = Watchdog(0.2, bite)
    assert not watchdog.bitten
    assert bitten.wait(SECONDS)
    assert watchdog.bitten
    assert 0.2 <= bites[0] - start < 2
    watchdog.feed()
    time.sleep(0.4)
    assert len(bites) == 1


def test_it_does_not_bite_while_it_is_fed() -> None:
    bitten = threading.Event()
    with Watchdog(0.3, bitten.set) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.feed()
        assert not watchdog.bitten
        fed = time.monotonic()
        assert bitten.wait(SECONDS)
        assert time.monotonic() - fed > 0.25
    assert watchdog.bitten


def test_it_has_the_patience_that_it_was_given_last() -> None:
    """A service says how rare its heartbeats are only when it has answered."""
    bitten = threading.Event()
    with Watchdog(0.2, bitten.set) as watchdog:
        watchdog.seconds = 0.6
        assert not bitten.wait(0.4)
        assert bitten.wait(SECONDS)


def test_a_stopped_one_does_not_bite_and_leaves_no_thread() -> None:
    before = threading.active_count()
    bitten = threading.Event()
    with Watchdog(0.1, bitten.set):
        assert threading.active_count() == before + 1
    watchdog = Watchdog(600, bitten.set)
    watchdog.stop()
    assert not bitten.wait(0.3)
    assert threading.active_count() == before
