"""The last events of a service."""

import logging
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from lesft import refused_calls
from lesft.errors import InvalidInput, Unreachable
from lesft.live.recent import LOGGERS, MAX_EVENTS, RecentEvents


@pytest.fixture
def recent(caplog: pytest.LogCaptureFixture) -> Iterator[RecentEvents]:
    caplog.set_level(logging.DEBUG)
    events = RecentEvents()
    events.attach()
    yield events
    events.detach()


def shown(recent: RecentEvents) -> list[tuple[str, str]]:
    return [(event.level, event.message) for event in recent.newest_first()]


def test_it_keeps_what_our_loggers_say_from_info_up_newest_first(recent: RecentEvents) -> None:
    logging.getLogger("lesft_server.run").info("round %d", 3)
    logging.getLogger("lesft_server.run").debug("a step")
    logging.getLogger("lesft.files").warning("no room")
    logging.getLogger("uvicorn.error").error("not ours")
    logging.getLogger("lesft_aggregator").error("failed", exc_info=ValueError("a secret"))
    assert shown(recent) == [("ERROR", "failed"), ("WARNING", "no room"), ("INFO", "round 3")]


def test_it_keeps_the_last_of_many(recent: RecentEvents) -> None:
    log = logging.getLogger("lesft_client")
    for index in range(MAX_EVENTS + 5):
        log.info("event %d", index)
    assert shown(recent) == [("INFO", f"event {index}") for index in range(MAX_EVENTS + 4, 4, -1)]


def test_an_event_is_one_short_line_whatever_was_logged(recent: RecentEvents) -> None:
    logging.getLogger("lesft").info("client %s\x1b[31m\n%s", "a\nb", "x" * 5000)
    [(_, message)] = shown(recent)
    assert message.startswith("client a b [31m xxx")
    assert len(message.encode()) == 1000


def test_what_is_told_to_the_user_is_an_event_too(recent: RecentEvents) -> None:
    recent.note("joined; the run begins\nwhen all have")
    assert shown(recent) == [("INFO", "joined; the run begins when all have")]


def test_nothing_is_lost_between_threads(recent: RecentEvents) -> None:
    def say_much() -> None:
        for _ in range(40):
            logging.getLogger("lesft.wire").info("x")

    threads = [threading.Thread(target=say_much) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(recent.newest_first()), recent.version) == (160, 160)


def test_refused_calls_are_events_but_a_flood_of_them_is_not_and_none_is_quoted(
    recent: RecentEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refused_calls.RefusedCalls(CollectorRegistry(), "test")
    train = "lesft.v1.TrainingService/Train"
    for index in range(1000):
        refused.count(train, InvalidInput(f"token {index}"))
    refused.count(train, Unreachable("gone"))
    both = [
        ("INFO", "a call of Train ended with Unreachable"),
        ("INFO", "a call of Train ended with InvalidInput"),
    ]
    assert shown(recent) == both
    monkeypatch.setattr(refused_calls, "QUIET_SECONDS", 0)
    refused.count(train, InvalidInput("token 7"))
    assert shown(recent) == [both[1], *both]


def test_it_hears_nothing_once_detached(recent: RecentEvents) -> None:
    recent.detach()
    recent.detach()
    logging.getLogger("lesft").info("late")
    assert recent.newest_first() == []
    assert not any(recent in logging.getLogger(name).handlers for name in LOGGERS)
