import asyncio

import httpx
import pytest

from lesft.errors import Unreachable
from lesft_client.distillation.pace import Backoff, Clock, Pace, Patience
from lesft_client.distillation.replies import retry_after_seconds


class FakeTime:
    """A clock on which only waiting takes time."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.clock = Clock(lambda: self.seconds, self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def turns(pace: Pace, time: FakeTime, count: int) -> list[float]:
    async def take() -> list[float]:
        taken = []
        for _ in range(count):
            await pace.turn()
            taken.append(round(time.seconds - 100, 1))
        return taken

    return asyncio.run(take())


def test_requests_are_spread_over_the_minute() -> None:
    time = FakeTime()
    assert turns(Pace(30, time.clock), time, 4) == [0, 2, 4, 6]


def test_a_fast_rate_may_send_one_seconds_requests_at_once() -> None:
    time = FakeTime()
    assert turns(Pace(180, time.clock), time, 6) == [0, 0, 0, 0.3, 0.7, 1.0]


def test_without_a_limit_nothing_waits() -> None:
    time = FakeTime()
    assert turns(Pace(0, time.clock), time, 3) == [0, 0, 0]


def test_a_hold_keeps_every_request_back() -> None:
    time = FakeTime()
    pace = Pace(0, time.clock)
    pace.hold(7)
    pace.hold(3)
    assert turns(pace, time, 2) == [7, 7]


def test_pauses_double_up_to_the_longest() -> None:
    backoff = Backoff(1, 8)
    for failures, most in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (5000, 8)):
        pauses = [backoff.pause(failures) for _ in range(50)]
        assert most / 2 <= min(pauses) < max(pauses) <= most


def test_patience_ends_in_the_middle_of_a_long_pause() -> None:
    time = FakeTime()
    patience = Patience(60, time.clock)
    with pytest.raises(Unreachable, match=r"^it is full \(nothing else for 60 s; .*patience"):
        asyncio.run(patience.pause(3600, "it is full"))
    assert time.seconds == 160


def test_a_success_renews_patience() -> None:
    time = FakeTime()
    patience = Patience(60, time.clock)

    async def fail_for_50_seconds() -> None:
        for _ in range(5):
            await patience.pause(10, "busy")

    asyncio.run(fail_for_50_seconds())
    patience.succeeded()
    time.seconds += 1000
    asyncio.run(fail_for_50_seconds())
    with pytest.raises(Unreachable):
        asyncio.run(fail_for_50_seconds())


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0.5"}, 0.5),
        (
            {
                "Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT",
                "Date": "Wed, 21 Oct 2015 07:28:00 GMT",
            },
            30,
        ),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "inf"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_seconds(httpx.Response(429, headers=headers)) == seconds
