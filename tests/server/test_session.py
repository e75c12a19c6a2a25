"""What a client may send when, over real gRPC, and what becomes of the run when one goes.

A client that breaks off or breaks a rule in mid-run costs nobody else anything: its own call ends,
nothing of the bad message is applied, and the run waits for it.
"""

import gc
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from lesft.cohort_batch import Part
from lesft.errors import (
    AlreadyJoined,
    InternalError,
    InvalidInput,
    OutOfOrder,
    RunStopped,
    Unreachable,
)
from lesft.micro_batch import MicroBatch, StepKey, StepResult, Targets
from lesft.micro_batch import Path as Activations
from lesft.step_messages import Admit, Limits, held_out_from_message
from lesft.v1 import training_pb2
from lesft_server.run import RunState
from lesft_server.session import MAX_HELD_OUT_WAITING
from tests.harness import random_samples
from tests.server.harness import (
    NARROW,
    RawSession,
    Snapshot,
    assert_serving,
    assert_unchanged,
    bulky_round,
    held_out_messages,
    join,
    leaving,
    make_batch,
    opening,
    raw_channel,
    refusal,
    snapshot,
    step_messages,
    train_to_the_end,
    wait_until,
)
from tests.server.mid_run import (
    NO_LEAVE,
    MidRun,
    serving,
    starting_mid_run,
    step_all,
    wait_until_away,
    waits_for,
)

# ---------------------------------------------------------------------- the order of micro-batches

WRONG_KEYS = {
    "repeated": StepKey(0, 0),
    "a gap": StepKey(0, 2),
    "the next round's": StepKey(1, 0),
    "of a far round": StepKey(2**32 - 1, 2**32 - 1),
}


@pytest.mark.parametrize("what", WRONG_KEYS)
def test_a_micro_batch_whose_turn_it_is_not_is_refused(
    what: str, mid_run: MidRun, after_round_0: Snapshot
) -> None:
    key = WRONG_KEYS[what]
    mid_run.b.send(*step_messages(make_batch(key)))
    message = f"round 0 micro-batch 1 is due, got {key}: each must come once and in order"
    assert mid_run.b.refusal() == refusal(OutOfOrder, message)
    mid_run.assert_waits_for_b(message, after_round_0)


def test_a_micro_batch_of_the_next_round_must_wait_for_the_answers_of_this_one(
    mid_run: MidRun, after_round_0: Snapshot
) -> None:
    # b's second one is not there yet, so a cannot have stepped its adapters at the round's end.
    mid_run.a.send(*step_messages(make_batch(StepKey(1, 0))))
    message = "round 1 micro-batch 0 came before the round before it was answered"
    assert mid_run.a.refusal() == refusal(OutOfOrder, message)
    assert mid_run.server.engine.run.members["a"].away_because == message
    assert_unchanged(mid_run.server, mid_run.before)
    assert_serving(mid_run.server)
    # What a sent before is still good.
    mid_run.a = mid_run.come_back("a", mid_run.at)
    mid_run.a.send(*step_messages(make_batch(mid_run.at)))
    mid_run.end_round()
    assert_unchanged(mid_run.server, after_round_0)


def test_a_micro_batch_past_the_last_round_is_refused_and_the_run_stays_finished(
    model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path, clients=1) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "a")
        for round_index in range(2):
            for micro in range(2):
                session.send(*step_messages(make_batch(StepKey(round_index, micro))))
            for _ in range(2):
                session.receive_step()
        trained = snapshot(server)
        session.send(*step_messages(make_batch(StepKey(2, 0))))
        assert session.refusal() == refusal(
            OutOfOrder, "round 2 micro-batch 0: the run has only 2 rounds"
        )
        assert server.engine.run.state is RunState.FINISHED
        assert [record.round for record in server.engine.run.rounds] == [0, 1]
        assert_unchanged(server, trained)
        assert_serving(server)


# ---------------------------------------------------------------------- those who go


def cancel(mid_run: MidRun) -> None:
    mid_run.b.call.cancel()


def cancel_in_mid_bundle(mid_run: MidRun) -> None:
    member = mid_run.server.engine.run.members["b"]
    before = member.last_seen
    messages = step_messages(make_batch(mid_run.at, (2300, 2300), (2300, 2300), (1, 1)))
    assert len(messages) == 3
    mid_run.b.send(*messages[:2])
    wait_until(lambda: member.last_seen > before)
    mid_run.b.call.cancel()


def close_the_stream(mid_run: MidRun) -> None:
    mid_run.b.close_requests()
    assert mid_run.b.refusal() == refusal(OutOfOrder, NO_LEAVE)


@pytest.mark.parametrize("how", [cancel, cancel_in_mid_bundle, close_the_stream])
def test_the_run_waits_for_a_client_that_breaks_off_and_knows_why(
    how: Callable[[MidRun], None], mid_run: MidRun, after_round_0: Snapshot
) -> None:
    how(mid_run)
    mid_run.assert_waits_for_b(NO_LEAVE, after_round_0)


def test_a_client_may_break_off_while_its_message_is_still_being_read(
    mid_run: MidRun, after_round_0: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then that message is dropped: the client is to send it again."""
    decoding, release = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        decoding.set()
        assert release.wait(20)

    with monkeypatch.context() as patched:
        patched.setattr("lesft_server.session.micro_batch_from_message", slow)
        mid_run.b.send(*step_messages(make_batch(mid_run.at)))
        try:
            assert decoding.wait(20)
            mid_run.b.call.cancel()
            wait_until_away(mid_run.server, "b")
        finally:
            release.set()
    assert mid_run.server.engine.run.members["b"].next_key == mid_run.at
    mid_run.assert_waits_for_b(NO_LEAVE, after_round_0)


def test_the_run_waits_for_a_client_whose_connection_is_gone(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        a = join(channel, server.spec, "a")
        with raw_channel(server.grpc) as other:
            b = join(other, server.spec, "b")
        assert b.call.done()
        wait_until_away(server, "b")
        assert waits_for(server) == f"client 'b' to come back ({NO_LEAVE})"
        step_all([a, join(channel, server.spec, "b", StepKey(0, 0))], StepKey(0, 0))
        assert_serving(server)


def test_a_leave_in_mid_run_ends_its_senders_call_well_and_its_reason_is_kept(
    mid_run: MidRun, after_round_0: Snapshot
) -> None:
    mid_run.b.send(leaving("the battery is low"))
    assert mid_run.b.rest() == []
    mid_run.assert_waits_for_b("the battery is low", after_round_0)


def test_a_leave_ends_the_call_although_a_micro_batch_still_waits_for_the_others(
    mid_run: MidRun,
) -> None:
    mid_run.a.send(leaving())
    assert mid_run.a.rest() == []
    assert mid_run.server.engine.run.members["a"].away_because == "it left"
    assert_unchanged(mid_run.server, mid_run.before)
    assert waits_for(mid_run.server) == "client b"  # for a's part is there


def test_a_hostile_reason_reaches_the_others_as_one_short_line(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with starting_mid_run(model, tmp_path, heartbeat_seconds=0.05) as mid_run:
        with caplog.at_level(logging.INFO):
            mid_run.b.send(leaving("bye\r\nround 9 of 9: loss 0.0000\x1b[2J " + "ä" * 500_000))
            assert mid_run.b.rest() == []
            wait_until(lambda: "to come back" in mid_run.a.receive_heartbeat())
        heard = mid_run.a.receive_heartbeat()
        assert heard.startswith("client 'b' to come back (bye round 9 of 9: loss 0.0000 [2J äää")
        assert heard.endswith("ä…)")
        assert len(heard.encode()) < 1100
    assert not any("\n" in record.getMessage() for record in caplog.records)
    assert max(len(record.getMessage()) for record in caplog.records) < 1100


def test_a_client_that_leaves_before_the_start_frees_its_place_and_can_come_back(
    model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        for reason in ("", "forgot the charger"):
            session = join(channel, server.spec, "client-0")
            assert list(server.engine.run.members) == ["client-0"]
            session.send(leaving(reason))
            assert session.rest() == []
            assert server.engine.run.members == {}
        session = join(channel, server.spec, "client-0")
        session.call.cancel()
        wait_until(lambda: not server.engine.run.members)
        assert server.engine.run.state is RunState.WAITING
        train_to_the_end(server, model, [random_samples(3, 1), random_samples(3, 2)])
        assert server.engine.run.state is RunState.FINISHED


# ---------------------------------------------------------------------- what the server must hold


def num_micro_batches_held() -> int:
    gc.collect()
    return sum(type(thing) is MicroBatch for thing in gc.get_objects())


def test_what_a_client_sent_before_it_left_goes_with_it(model: Path, tmp_path: Path) -> None:
    """Were the parts kept, ever new names would pile them up, and they would count as others'."""
    before = num_micro_batches_held()
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        for name in ("x", "y", "z"):
            session = join(channel, server.spec, name)
            for micro in range(2):
                session.send(*step_messages(make_batch(StepKey(0, micro))))
            member = server.engine.run.members[name]
            wait_until(lambda member=member: member.next_key == StepKey(1, 0))
            assert num_micro_batches_held() == before + 2
            session.send(leaving())
            assert session.rest() == []
        assert num_micro_batches_held() == before
        train_to_the_end(server, model, [random_samples(3, 1), random_samples(3, 2)])
        assert server.engine.run.state is RunState.FINISHED


def test_a_client_that_comes_and_goes_in_mid_run_piles_nothing_up(mid_run: MidRun) -> None:
    before = num_micro_batches_held()
    for _ in range(3):
        mid_run.a.call.cancel()
        wait_until_away(mid_run.server, "a")
        mid_run.a = mid_run.come_back("a", mid_run.at)
        mid_run.a.send(*step_messages(make_batch(mid_run.at)))
        member = mid_run.server.engine.run.members["a"]
        wait_until(lambda member=member: member.next_key == StepKey(1, 0))
    # What came first, and what the session that is open has sent again.
    wait_until(lambda: num_micro_batches_held() == before + 1)
    mid_run.end_round()
    wait_until(lambda: num_micro_batches_held() == before - 1)


def test_unanswered_held_out_requests_are_bounded(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "a")
        session.send(*step_messages(make_batch(StepKey(0, 0))))  # its answer waits for b
        for index in range(MAX_HELD_OUT_WAITING + 1):
            session.send(*held_out_messages(index))
        assert session.refusal() == refusal(
            OutOfOrder, "at most 8 held_out requests may be unanswered"
        )
        assert server.engine.run.members == {}
        assert_serving(server)


def test_as_many_held_out_requests_as_may_wait_are_answered_in_order(
    model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        a, b = (join(channel, server.spec, name) for name in "ab")
        a.send(*step_messages(make_batch(StepKey(0, 0))))
        for index in range(MAX_HELD_OUT_WAITING):
            a.send(*held_out_messages(index))
        b.send(*step_messages(make_batch(StepKey(0, 0))))
        assert a.receive_step().round == 0
        scores = [a.receive().held_out for _ in range(MAX_HELD_OUT_WAITING)]
        assert [score.index for score in scores] == list(range(MAX_HELD_OUT_WAITING))
        assert len({tuple(score.nll_sums) for score in scores}) == 1
        assert all(nll > 0 for nll in scores[0].nll_sums)


def test_answers_that_a_client_does_not_read_count_as_unanswered(
    model: Path, tmp_path: Path
) -> None:
    """Else a client could make the server hold the answers of all rounds."""
    loss = {"token_weights": "uniform"}
    with (
        serving(model, tmp_path, clients=1, loss=loss) as server,
        raw_channel(server.grpc, *NARROW) as channel,
    ):
        session = join(channel, server.spec, "a")
        session.send(*bulky_round(0))
        # The first answer is on its way, as far as it fits; the second is computed.
        wait_until(lambda: server.engine.run.rounds)
        session.send(*bulky_round(1))
        wait_until_away(server, "a")
        assert session.refusal() == refusal(
            OutOfOrder, "round 1 micro-batch 0 came before the round before it was answered"
        )
        assert [record.round for record in server.engine.run.rounds] == [0]
        assert_serving(server)


def test_a_session_that_was_ended_takes_nothing_more_while_its_client_does_not_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, release = threading.Event(), threading.Event()
    decoded: list[int] = []

    def slow(
        header: training_pb2.HeldOut, data: bytes, limits: Limits, admit: Admit
    ) -> tuple[Activations, Targets]:
        decoded.append(header.index)
        decoding.set()
        assert release.wait(20)
        return held_out_from_message(header, data, limits, admit)

    monkeypatch.setattr("lesft_server.session.held_out_from_message", slow)
    loss = {"token_weights": "uniform"}
    with (
        serving(model, tmp_path, clients=1, loss=loss) as server,
        raw_channel(server.grpc, *NARROW) as channel,
        raw_channel(server.grpc) as other,
    ):
        scored: list[Targets] = []
        monkeypatch.setattr(
            server.engine.back, "score", lambda _, targets: scored.append(targets) or [0.0]
        )
        session = join(channel, server.spec, "a", instance_id="phone")
        session.send(*bulky_round(0))
        wait_until(lambda: server.engine.run.rounds)
        session.send(*held_out_messages(0), *held_out_messages(1))
        try:
            assert decoding.wait(20)
            later = join(other, server.spec, "a", StepKey(0, 0), instance_id="phone")
        finally:
            release.set()
        assert session.refusal() == refusal(AlreadyJoined, "client 'a' has opened another session")
        snapshot(server)  # after all jobs that were queued
        assert decoded == [0]
        assert scored == []
        assert later.call.is_active()


# ---------------------------------------------------------------------- when the server fails

FAILED = "its call failed on the server; the log has the details"


def test_a_failure_while_scoring_is_logged_and_told_without_details(
    mid_run: MidRun,
    after_round_0: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> list[float]:
        raise RuntimeError("CUDA out of memory at 0xdeadbeef")

    monkeypatch.setattr(mid_run.server.engine.back, "score", fail)
    mid_run.b.send(*held_out_messages())
    assert mid_run.b.refusal() == refusal(
        InternalError, "internal error; the service's log has the details"
    )
    mid_run.assert_waits_for_b(FAILED, after_round_0)
    assert "RuntimeError: CUDA out of memory at 0xdeadbeef" in caplog.text


def test_a_failure_while_reading_a_message_is_logged_and_told_without_details(
    mid_run: MidRun,
    after_round_0: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug in the checks")

    with monkeypatch.context() as patched:
        patched.setattr("lesft_server.session.check_lengths", fail)
        mid_run.b.send(*held_out_messages())
        assert mid_run.b.refusal() == refusal(
            InternalError, "internal error; the service's log has the details"
        )
    mid_run.assert_waits_for_b(FAILED, after_round_0)
    assert "RuntimeError: a bug in the checks" in caplog.text


STEP_FAILURES = {
    "a bug": (
        RuntimeError("CUDA out of memory at 0xdeadbeef"),
        "round 0 micro-batch 1 failed on the server; its log has the details",
    ),
    "bad activations": (
        InvalidInput("client 'b': its activations lead to NaN"),
        "client 'b': its activations lead to NaN",
    ),
}


@pytest.mark.parametrize("what", STEP_FAILURES)
def test_a_step_that_fails_stops_the_run_for_all_clients_with_the_reason(
    what: str,
    mid_run: MidRun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    error, reason = STEP_FAILURES[what]

    def fail(*_: object) -> list[StepResult]:
        raise error

    monkeypatch.setattr(mid_run.server.engine.back, "train_step", fail)
    mid_run.b.send(*step_messages(make_batch(mid_run.at)))
    ended = refusal(RunStopped, f"the run has ended: {reason}")
    assert mid_run.b.refusal() == ended
    assert mid_run.a.refusal() == ended
    for name in "ac":  # one that comes back, and a newcomer
        late = RawSession(mid_run.channel)
        late.send(opening(mid_run.server.spec, name))
        assert late.refusal() == ended
    assert mid_run.server.engine.run.state is RunState.STOPPED
    assert mid_run.server.engine.run.steps == 1
    assert_unchanged(mid_run.server, mid_run.before)
    assert_serving(mid_run.server)
    assert ("0xdeadbeef" in caplog.text) == (what == "a bug")


def test_a_server_that_stops_has_its_clients_wait_until_it_is_started_again(
    model: Path, tmp_path: Path
) -> None:
    with ExitStack() as channels:
        with serving(model, tmp_path) as server:
            channel = channels.enter_context(raw_channel(server.grpc))
            sessions = [join(channel, server.spec, name) for name in "ab"]
        for session in sessions:
            assert session.refusal() == refusal(Unreachable, "the test is over")
    assert server.engine.run.state is RunState.TRAINING


def test_a_server_that_is_stopped_in_the_midst_of_a_step_stops_quietly(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started, release = threading.Event(), threading.Event()
    with starting_mid_run(model, tmp_path) as mid_run:
        back, run = mid_run.server.engine.back, mid_run.server.engine.run
        train_step = back.train_step

        def slow(key: StepKey, parts: Sequence[Part]) -> list[StepResult]:
            started.set()
            assert release.wait(20)
            return train_step(key, parts)

        monkeypatch.setattr(back, "train_step", slow)
        mid_run.b.send(*step_messages(make_batch(mid_run.at)))
        assert started.wait(20)
        releasing = threading.Timer(0.3, release.set)  # the server is stopped meanwhile
        releasing.start()
    releasing.join()
    assert run.state is RunState.TRAINING
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
