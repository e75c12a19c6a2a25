"""Every second between two steps has one state, whatever overlaps."""

import pytest

from lesft_server.device_account import STATES, DeviceAccount


def seconds(account: DeviceAccount) -> dict[str, float]:
    return {state: value for state, value in account.round_done().items() if value}


def test_the_states_between_two_steps_add_up_to_the_time_between_them() -> None:
    account = DeviceAccount()
    account.begin(10.0)
    account.step(True, first_part=10.0, complete=12.0, began=12.5, ended=15.0)
    assert seconds(account) == {"cohort_wait": 2.0, "queue": 0.5, "back": 2.5}
    account.kept(16.0)
    waited = account.step(True, first_part=17.0, complete=20.0, began=20.25, ended=22.0)
    assert waited == (17.0, 20.0)
    expected = {"keep": 1.0, "idle": 1.0, "cohort_wait": 3.0, "queue": 0.25, "back": 1.75}
    assert seconds(account) == expected
    assert sum(expected.values()) == 22.0 - 15.0
    assert seconds(account) == {}


def test_what_came_while_the_model_was_busy_was_not_waited_for() -> None:
    account = DeviceAccount()
    account.begin(0.0)
    account.step(True, first_part=0.0, complete=1.0, began=1.0, ended=5.0)
    account.kept(6.0)  # within a round the next step need not wait for it
    waited = account.step(False, first_part=2.0, complete=4.0, began=5.0, ended=8.0)
    assert waited == (5.0, 5.0)
    assert seconds(account) == {"cohort_wait": 1.0, "back": 7.0}
    account.step(True, first_part=7.0, complete=7.5, began=9.0, ended=10.0)
    assert seconds(account) == {"queue": 1.0, "back": 1.0}


def test_training_that_is_under_way_does_not_begin_again() -> None:
    account = DeviceAccount()
    account.begin(3.0)
    account.begin(9.0)
    account.step(True, first_part=4.0, complete=4.0, began=4.0, ended=9.5)
    assert seconds(account) == {"idle": 1.0, "back": 5.5}
    totals = {
        sample.labels["state"]: sample.value
        for metric in account.counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    assert totals == dict.fromkeys(STATES, 0.0) | {
        "idle": pytest.approx(1.0),
        "back": pytest.approx(5.5),
    }
