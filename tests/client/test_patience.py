"""Trying again: how often, for how long, and what the user hears of it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from lesft.errors import STATUS, LesftError, RunStopped, Unreachable
from lesft_client import patience
from lesft_client.patience import patiently


class Clock:
    """Time that passes only while somebody sleeps or a call says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


@pytest.fixture
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "random", SimpleNamespace(uniform=lambda low, high: 1.0))


def failing(times: int, error: BaseException) -> Callable[[], int]:
    """A call that fails so many times, and then returns how often it was made."""
    calls = 0

    def call() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error
        return calls

    return call


def test_an_answer_is_returned_at_once(clock: Clock) -> None:
    assert patiently(failing(0, Unreachable("")), 60) == 1
    assert clock.pauses == []


@pytest.mark.usefixtures("no_jitter")
def test_pauses_double_from_a_fifth_of_a_second_to_ten(clock: Clock) -> None:
    assert patiently(failing(8, Unreachable("server s:1: connection refused")), 3600) == 9
    assert clock.pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]


def test_pauses_differ_by_up_to_a_fifth_so_that_clients_do_not_come_all_at_once(
    clock: Clock,
) -> None:
    for _ in range(50):
        patiently(failing(1, Unreachable("")), 60)
    assert all(0.16 <= pause <= 0.24 for pause in clock.pauses)
    assert max(clock.pauses) - min(clock.pauses) > 0.02


@pytest.mark.usefixtures("no_jitter")
def test_it_says_who_does_not_answer_and_when_it_tries_again(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    patiently(failing(2, Unreachable("server s:1: connection refused")), 60)
    assert caplog.messages == [
        "server s:1: connection refused; trying again in 0.2 s",
        "server s:1: connection refused; trying again in 0.4 s",
    ]


@pytest.mark.usefixtures("no_jitter")
def test_it_gives_up_when_patience_ends_and_says_how_long_it_tried(clock: Clock) -> None:
    with pytest.raises(Unreachable) as caught:
        patiently(failing(1000, Unreachable("server s:1: connection refused")), 6)
    assert clock.pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3])
    assert str(caught.value) == (
        "server s:1: connection refused (tried for 6 s; is it running and is the address right? "
        "--patience-seconds waits longer)"
    )


def test_it_names_the_option_that_sets_this_patience(clock: Clock) -> None:
    with pytest.raises(Unreachable, match=r"\? --reconnect-seconds waits longer\)$"):
        patiently(failing(1000, Unreachable("")), 6, option="--reconnect-seconds")


@pytest.mark.usefixtures("no_jitter")
def test_the_last_try_is_at_the_end_of_patience_and_may_succeed(clock: Clock) -> None:
    assert patiently(failing(5, Unreachable("")), 6) == 6
    assert clock.now == pytest.approx(1006)


@pytest.mark.usefixtures("no_jitter")
def test_a_long_wait_for_an_answer_is_no_failure_to_answer(clock: Clock) -> None:
    """The others may take an hour to hand in their adapters; then the connection may break."""
    answers: list[float] = [3600, 0, 0, 3600, 0, 0]

    def call() -> str:
        if not answers:
            return "at last"
        clock.now += answers.pop(0)
        raise Unreachable("aggregator a:1: connection reset")

    assert patiently(call, 4) == "at last"
    assert clock.pauses == [0.2, 0.4, 0.8, 0.2, 0.4, 0.8]


@pytest.mark.usefixtures("no_jitter")
def test_patience_starts_anew_after_progress(clock: Clock) -> None:
    sizes = iter([0, 100, 100, 200, 300, 300, 300, 300, 300])
    size = 0

    def call() -> None:
        nonlocal size
        clock.now += 1
        size = next(sizes)
        raise Unreachable("server s:1: connection reset")

    with pytest.raises(Unreachable, match=r"tried for 7 s"):
        patiently(call, 6, progress=lambda: size)
    assert clock.pauses == pytest.approx([0.2, 0.2, 0.4, 0.2, 0.2, 0.4, 0.8, 1.6])


def test_nothing_is_tried_again_that_nobody_wants_any_more(clock: Clock) -> None:
    def still_wanted() -> None:
        raise RunStopped("the run has ended")

    with pytest.raises(RunStopped, match="the run has ended"):
        patiently(failing(1, Unreachable("")), 60, still_wanted)
    assert clock.pauses == []


@pytest.mark.usefixtures("no_jitter")
def test_the_time_that_calls_take_counts(clock: Clock) -> None:
    def slow() -> None:
        clock.now += 20
        raise Unreachable("server s:1: no answer")

    with pytest.raises(Unreachable, match=r"tried for 61 s"):
        patiently(slow, 50)
    assert clock.pauses == [0.2, 0.4]


def test_no_pause_is_too_short_to_be_one(clock: Clock) -> None:
    with pytest.raises(Unreachable):
        patiently(failing(1000, Unreachable("")), 7)
    assert min(clock.pauses) >= 0.1


@pytest.mark.parametrize("kind", [kind for kind in STATUS if not issubclass(kind, Unreachable)])
def test_no_other_error_is_tried_again(kind: type[LesftError], clock: Clock) -> None:
    with pytest.raises(kind, match="no"):
        patiently(failing(1, kind("no")), 60)
    assert clock.pauses == []


def test_an_error_after_some_tries_is_that_error(clock: Clock) -> None:
    errors: list[LesftError] = [Unreachable("not yet"), RunStopped("the run has ended")]

    def call() -> None:
        raise errors.pop(0)

    with pytest.raises(RunStopped, match="the run has ended"):
        patiently(call, 60)
    assert len(clock.pauses) == 1


def test_ctrl_c_ends_it(clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt):
        patiently(failing(1, KeyboardInterrupt()), 60)
    assert clock.pauses == []
