"""Heartbeats both ways, and clients that stall, flood or do not read, over real gRPC."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lesft.errors import OutOfOrder, Unreachable
from lesft.micro_batch import StepKey
from lesft_server.run import RunState
from lesft_server.session import MAX_HEARTBEATS
from tests.harness import server_settings
from tests.server.harness import (
    NARROW,
    RawSession,
    Snapshot,
    assert_serving,
    bulky_round,
    heartbeat,
    held_out_messages,
    join,
    leaving,
    make_batch,
    raw_channel,
    refusal,
    step_messages,
    wait_until,
)
from tests.server.mid_run import MidRun, serving, starting_mid_run, step_all, wait_until_away

STALLS_SOON = {"heartbeat_seconds": 0.05, "stall_seconds": 0.8}
NOTHING_HEARD = refusal(Unreachable, "nothing was heard of it for 0.8 s")


@contextmanager
def beating(*sessions: RawSession) -> Iterator[None]:
    """Clients that are there and have nothing to send while the block runs."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            for session in sessions:
                session.send(heartbeat())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---------------------------------------------------------------------- the server's heartbeats


def test_the_servers_heartbeats_say_what_a_client_waits_for(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path, heartbeat_seconds=0.05) as server,
        raw_channel(server.grpc) as channel,
    ):

        def hears(session: RawSession, waiting_for: str) -> None:
            wait_until(lambda: session.receive_heartbeat() == waiting_for)

        a = join(channel, server.spec, "a")
        assert a.receive_heartbeat() == "1 more client to join"
        b = join(channel, server.spec, "b")
        hears(a, "")  # it is its own turn
        a.send(*step_messages(make_batch(StepKey(0, 0))))
        hears(a, "client b")
        b.send(leaving("the battery is low"))
        hears(a, "client 'b' to come back (the battery is low)")
        b = join(channel, server.spec, "b", StepKey(0, 0))
        hears(a, "client b")
        assert b.receive_heartbeat() == ""
        b.send(*step_messages(make_batch(StepKey(0, 0))))
        for session in (a, b):
            assert session.receive_step().round == 0
        hears(a, "")


def test_the_server_sends_one_heartbeat_per_interval_and_none_while_it_has_answers(
    model: Path, tmp_path: Path
) -> None:
    options = {"clients": 1, "heartbeat_seconds": 0.2}
    with serving(model, tmp_path, **options) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "a")
        session.receive_heartbeat()
        start = time.monotonic()
        for _ in range(3):
            session.receive_heartbeat()
        assert 0.5 < time.monotonic() - start < 5
        session.send(*held_out_messages(0), *held_out_messages(1))
        kinds = [next(session.call).WhichOneof("message") for _ in range(2)]
        assert kinds == ["held_out", "held_out"]


# ---------------------------------------------------------------------- the client's heartbeats


def test_a_client_with_nothing_to_send_stays_as_long_as_its_heart_beats(
    model: Path, tmp_path: Path
) -> None:
    options = {"clients": 1, **STALLS_SOON}
    with serving(model, tmp_path, **options) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "a")
        with beating(session):
            end = time.monotonic() + 1.6
            while time.monotonic() < end:
                session.receive_heartbeat()
            step_all([session], StepKey(0, 0))
        assert server.engine.run.members["a"].resumed == 0


def test_a_flood_of_heartbeats_is_refused(mid_run: MidRun, after_round_0: Snapshot) -> None:
    most = MAX_HEARTBEATS + 24  # and those that a cut of twice 60 s would have held up
    mid_run.b.send(*[heartbeat()] * most, *held_out_messages())
    assert min(mid_run.b.receive().held_out.nll_sums) > 0
    mid_run.b.send(heartbeat())
    message = f"at most {most} heartbeats may come within 5 s: one is enough"
    assert mid_run.b.refusal() == refusal(OutOfOrder, message)
    mid_run.assert_waits_for_b(message, after_round_0)


# ---------------------------------------------------------------------- those who stall


@pytest.mark.parametrize("in_mid_bundle", [False, True])
def test_the_run_waits_for_a_client_that_stalls(
    in_mid_bundle: bool, model: Path, tmp_path: Path, after_round_0: Snapshot
) -> None:
    with starting_mid_run(model, tmp_path, **STALLS_SOON) as mid_run, beating(mid_run.a):
        if in_mid_bundle:
            messages = step_messages(make_batch(mid_run.at, (2300, 2300), (2300, 2300), (1, 1)))
            assert len(messages) == 3
            mid_run.b.send(*messages[:2])
        assert mid_run.b.refusal() == NOTHING_HEARD
        mid_run.assert_waits_for_b(NOTHING_HEARD.message, after_round_0)


def test_a_client_that_stalls_before_the_start_loses_its_place(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path, **STALLS_SOON) as server,
        raw_channel(server.grpc) as channel,
    ):
        session = join(channel, server.spec, "a")
        assert session.refusal() == NOTHING_HEARD
        assert server.engine.run.members == {}
        assert server.engine.run.state is RunState.WAITING


def test_a_client_that_does_not_open_its_session_is_refused(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path, **STALLS_SOON) as server,
        raw_channel(server.grpc) as channel,
    ):
        assert RawSession(channel).refusal() == refusal(
            OutOfOrder, "open did not come within 0.8 s"
        )
        assert_serving(server)


def test_the_run_waits_for_a_client_that_reads_nothing_although_its_heart_beats(
    model: Path, tmp_path: Path
) -> None:
    options = {"clients": 1, "loss": {"token_weights": "uniform"}, **STALLS_SOON}
    with (
        serving(model, tmp_path, **options) as server,
        raw_channel(server.grpc, *NARROW) as channel,
        raw_channel(server.grpc) as other,
    ):
        session = join(channel, server.spec, "a")
        session.send(*bulky_round(0))
        with beating(session):
            wait_until_away(server, "a")
            why = "it has read nothing for 0.8 s"
            assert server.engine.run.members["a"].away_because == why
            assert server.engine.run.state is RunState.TRAINING
        # It gets its answers as soon as it reads.
        back = join(other, server.spec, "a", StepKey(0, 0))
        back.send(*bulky_round(0))
        assert [back.receive_step().micro for _ in range(2)] == [0, 1]
        assert server.engine.run.steps == 2
        assert session.refusal() == refusal(Unreachable, why)


def test_heartbeats_that_come_too_rarely_for_the_patience_are_refused(
    model: Path, tmp_path: Path
) -> None:
    message = r"--stall-seconds must be at least twice --heartbeat-seconds \(5\), got 9.9"
    with pytest.raises(ValueError, match=message):
        server_settings(model, tmp_path, heartbeat_seconds=5, stall_seconds=9.9)
    server_settings(model, tmp_path, heartbeat_seconds=5, stall_seconds=10)
