"""A run with a deadline and three clients, of which two suffice: it never waits for nobody."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from lesft.errors import LeftBehind, RunStopped
from lesft.micro_batch import StepKey
from lesft.v1 import training_pb2
from lesft_server.run import RunState
from tests.harness import RunningServer
from tests.server.harness import (
    RawSession,
    join,
    make_batch,
    next_of,
    opening,
    raw_channel,
    step_messages,
    wait_until,
    without_pauses,
)
from tests.server.mid_run import serving, step_all, wait_until_away

DEADLINE_SECONDS = 0.4


class Trio:
    """The server and sessions of a, b and c."""

    def __init__(self, server: RunningServer, channel: grpc.Channel) -> None:
        self.server, self._channel = server, channel
        self.cohort = server.engine.cohort
        self.a, self.b, self.c = (
            join(channel, server.spec, name, instance_id=name) for name in "abc"
        )

    def comes_back(self, name: str, **changes: Any) -> tuple[RawSession, StepKey]:
        """Another session of a client, and the round at which it is to rejoin."""
        session = RawSession(self._channel)
        session.send(opening(self.server.spec, name, instance_id=name, **changes))
        opened = session.receive().opened
        assert opened.course == training_pb2.COURSE_REJOIN
        return session, next_of(opened)

    def is_late(self, session: RawSession, name: str, key: StepKey) -> tuple[RawSession, StepKey]:
        """A client's part comes once its step has begun; it rejoins as it is told."""
        session.send(*step_messages(make_batch(key)))
        assert session.refusal().kind is LeftBehind
        position = training_pb2.Position(round=key.round, micro=key.micro)
        return self.comes_back(name, position=position)

    def dies(self, session: RawSession, name: str) -> None:
        """A client's process is gone."""
        session.call.cancel()
        wait_until_away(self.server, name)

    def begun(self, key: StepKey) -> None:
        """Return once a step has begun."""
        wait_until(lambda: self.cohort._to_begin > key)


@pytest.fixture
def trio(model: Path, tmp_path: Path) -> Iterator[Trio]:
    options = {"mode": "deadline", "deadline_seconds": DEADLINE_SECONDS}
    with (
        without_pauses(),
        serving(model, tmp_path, clients=3, rounds=4, aggregation_interval=4, **options) as server,
        raw_channel(server.grpc) as channel,
    ):
        yield Trio(server, channel)


def test_a_round_that_lacks_a_quorum_goes_on_with_those_who_can_still_end_it(trio: Trio) -> None:
    step_all([trio.a, trio.b], StepKey(0, 0))  # without c
    _, at = trio.is_late(trio.c, "c", StepKey(0, 0))
    assert at == StepKey(1, 0)
    trio.dies(trio.b, "b")
    trio.a.send(*step_messages(make_batch(StepKey(0, 1))))
    time.sleep(2 * DEADLINE_SECONDS)
    assert trio.cohort._to_begin == StepKey(0, 1)  # b may come back
    dropped = httpx.delete(f"http://{trio.server.control}/v1/clients/b")
    assert dropped.status_code == 200
    trio.begun(StepKey(0, 1))
    assert trio.a.receive_step().micro == 1


def test_a_round_does_not_wait_for_a_client_that_was_told_to_rejoin_at_a_later_one(
    trio: Trio,
) -> None:
    step_all([trio.a, trio.c], StepKey(0, 0))
    b, _ = trio.is_late(trio.b, "b", StepKey(0, 0))
    step_all([trio.a, trio.c], StepKey(0, 1))
    step_all([trio.a, b], StepKey(1, 0))
    trio.is_late(trio.c, "c", StepKey(1, 0))
    trio.dies(b, "b")
    _, at = trio.comes_back("b", checkpoint_rounds=[0])  # its checkpoint is from before it was late
    assert at == StepKey(2, 0)
    step_all([trio.a], StepKey(1, 1))
    assert trio.cohort._to_begin == StepKey(2, 0)


def test_a_part_that_a_client_will_not_follow_up_does_not_count(trio: Trio) -> None:
    step_all([trio.a, trio.c], StepKey(0, 0))
    b, _ = trio.is_late(trio.b, "b", StepKey(0, 0))
    step_all([trio.a, trio.c], StepKey(0, 1))
    step_all([trio.a, b, trio.c], StepKey(1, 0))
    b.send(*step_messages(make_batch(StepKey(1, 1))))
    wait_until(lambda: trio.cohort.num_waiting == 1)
    trio.dies(b, "b")
    trio.comes_back("b", checkpoint_rounds=[0])
    assert trio.cohort.num_waiting == 0
    step_all([trio.a, trio.c], StepKey(1, 1))


def test_a_round_that_nobody_can_end_stops_the_run_which_says_so(trio: Trio) -> None:
    step_all([trio.a, trio.b], StepKey(0, 0))
    c, _ = trio.is_late(trio.c, "c", StepKey(0, 0))
    for name in "ab":
        httpx.delete(f"http://{trio.server.control}/v1/clients/{name}")
    ended = c.refusal()
    assert ended.kind is RunStopped
    assert ended.message == (
        "the run has ended: no client is left that can finish round 0; start server and clients "
        "again with the same --state to go on from the last checkpoint"
    )
    assert trio.server.engine.run.state is RunState.STOPPED


def pause_while_c_is_due(trio: Trio) -> Callable[[], httpx.Response]:
    """Pause for longer than the deadline, once a and b have sent their parts; returns `resume`."""
    for session in (trio.a, trio.b):
        session.send(*step_messages(make_batch(StepKey(0, 0))))
    wait_until(lambda: trio.cohort.num_waiting == 2)
    control = f"http://{trio.server.control}/v1"
    httpx.post(f"{control}/pause")
    time.sleep(2 * DEADLINE_SECONDS)
    assert trio.cohort._to_begin == StepKey(0, 0)
    return lambda: httpx.post(f"{control}/resume")


def test_a_pause_holds_the_deadline(trio: Trio) -> None:
    resume = pause_while_c_is_due(trio)
    trio.c.send(*step_messages(make_batch(StepKey(0, 0))))
    trio.begun(StepKey(0, 0))
    resume()
    for session in (trio.a, trio.b, trio.c):
        assert session.receive_step().micro == 0


def test_the_deadline_begins_anew_when_a_pause_ends(trio: Trio) -> None:
    resume = pause_while_c_is_due(trio)
    resume()
    for session in (trio.a, trio.b):
        assert session.receive_step().micro == 0
