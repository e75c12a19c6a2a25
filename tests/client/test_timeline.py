"""Where the time of a micro-batch went, and what of it the loop has waited for."""

import math

import pytest

from lesft.v1.training_pb2 import StepTimes
from lesft_client.timeline import WAITS, Moments
from lesft_client.trainer import PhaseTimer

HANDED_IN = 100.0
SERVER = StepTimes(receive=0.2, decode=0.1, queue=0.4, back=1.0, answer=0.3, send=0.05)
MOMENTS = Moments(
    encoding=100.5, encoded=100.6, header=103.0, whole=103.5, decoded=103.75, server=SERVER
)
WAY = (103.0 - 100.6 - 2.05) / 2


def test_all_the_time_of_a_micro_batch_has_a_phase() -> None:
    assert MOMENTS.phases(HANDED_IN) == [
        ("wait_uplink", pytest.approx(0.5)),
        ("wait_encode", pytest.approx(0.1)),
        ("wait_uplink", pytest.approx(0.2 + WAY)),
        ("wait_server_decode", pytest.approx(0.1)),
        ("wait_queue", pytest.approx(0.4)),
        ("wait_back", pytest.approx(1.0)),
        ("wait_answer", pytest.approx(0.3)),
        ("wait_downlink", pytest.approx(0.05 + WAY + 0.5)),
        ("wait_decode", pytest.approx(0.25)),
    ]
    assert sum(seconds for _, seconds in MOMENTS.phases(HANDED_IN)) == pytest.approx(3.75)
    assert {name for name, _ in MOMENTS.phases(HANDED_IN)} == set(WAITS)


def test_whoever_begins_to_wait_late_waits_for_what_comes_last() -> None:
    down = 0.55 + WAY
    assert MOMENTS.waited_for(HANDED_IN, 0.2) == {"wait_decode": pytest.approx(0.2)}
    assert MOMENTS.waited_for(HANDED_IN, 0.25 + down + 0.3 + 0.6) == {
        "wait_decode": pytest.approx(0.25),
        "wait_downlink": pytest.approx(down),
        "wait_answer": pytest.approx(0.3),
        "wait_back": pytest.approx(0.6),
    }
    everything = MOMENTS.waited_for(HANDED_IN, 50.0)
    assert sum(everything.values()) == pytest.approx(3.75)
    assert everything["wait_uplink"] == pytest.approx(0.7 + WAY)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -5.0, 1e300])
def test_a_server_that_measures_nonsense_does_no_harm(value: float) -> None:
    server = StepTimes(receive=value, decode=value, queue=value, back=value, send=value)
    moments = Moments(100.5, 100.6, 103.0, 103.5, 103.75, server)
    waited = moments.waited_for(HANDED_IN, 2.0)
    assert sum(waited.values()) == pytest.approx(2.0)
    assert all(0 < seconds <= 2 for seconds in waited.values())


def test_a_phase_is_counted_as_its_explanation_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("lesft_client.trainer.time.monotonic", lambda: next(clock))
    timer = PhaseTimer({"other": 1.0})
    with timer.phase("waiting", lambda seconds: {"other": seconds / 2, "more": 0.5}):
        pass
    assert timer.seconds == {"waiting": 1.0, "other": 2.5, "more": 0.5}
    with pytest.raises(KeyError), timer.phase("waiting", lambda seconds: {"other": seconds}):
        raise KeyError
    assert timer.seconds == {"waiting": 2.0, "other": 2.5, "more": 0.5}
