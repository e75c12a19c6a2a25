"""A round's time, against pipelines that were gone through by hand."""

import pytest

from lesft_client.planning.step_model import Stages, round_seconds


def stages(**seconds: float) -> Stages:
    names = Stages.model_fields
    return Stages(**{**dict.fromkeys(names, 0.0), **seconds})


def test_alone_each_stage_takes_its_time_for_every_micro_batch() -> None:
    for name in ("forward", "up", "server", "down", "backward"):
        assert round_seconds(stages(**{name: 2.0}), accumulation=3, in_flight=3) == 6.0
    once = stages(optimizer=2.0, aggregation=3.0)
    assert round_seconds(once, accumulation=3, in_flight=3) == 5.0


def test_the_slowest_stage_sets_the_pace_and_the_others_fill_and_drain() -> None:
    # Forwards end at 1, 2, 3; the server, busy from 1 on, ends at 5, 9, 13; one backward after.
    shape = stages(forward=1, server=4, backward=2)
    assert round_seconds(shape, accumulation=3, in_flight=3) == 15.0
    assert shape.bottleneck(3, 3) == "server"
    # Uploads end at 3, 5, 7 and 9, the server at 4, 6, 8, 10, downloads at 7, 10, 13, 16.
    shape = stages(forward=1, up=2, server=1, down=3, backward=0.5)
    assert round_seconds(shape, accumulation=4, in_flight=4) == 16.5
    assert shape.bottleneck(4, 4) == "downlink"


def test_a_device_that_is_slow_has_its_gradients_waiting() -> None:
    # Forwards end at 3, 6, 9; all gradients but the last are there by then: 9 + 2 + 2, and the
    # last comes at 9 + 1.
    shape = stages(forward=3, server=1, backward=2)
    assert round_seconds(shape, accumulation=3, in_flight=3) == 15.0
    assert shape.bottleneck(3, 3) == "device"


def test_one_in_flight_waits_for_each_round_trip() -> None:
    shape = stages(forward=1, server=2, backward=1, round_trip=4)
    assert round_seconds(shape, accumulation=3, in_flight=1) == 3 * (1 + 2 + 4 + 1)
    assert shape.bottleneck(3, 1) == "round trip"
    # In a window the round trip is waited for once: 1, then server at 5, 7, 9, back at 11.
    assert round_seconds(shape, accumulation=3, in_flight=3) == 12.0
    # Two in flight. Servers end at 5 and 7, gradients arrive at 7 and 9: the third goes forward
    # from 8 to 9, and its gradient comes at 9 + 2 + 2 + 2.
    assert round_seconds(shape, accumulation=3, in_flight=2) == 16.0
    assert shape.busy(3, 2)["round trip"] == 8.0


def test_what_a_round_waits_for_counts_the_optimizer_as_the_devices() -> None:
    shape = stages(forward=1, backward=1, optimizer=3, up=2.5)
    assert shape.busy(2, 2) == pytest.approx(
        {"device": 7, "uplink": 5, "server": 0, "downlink": 0, "round trip": 0}
    )
