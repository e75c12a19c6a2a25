"""Coming back over real gRPC: where a client goes on, what it gets again, a server's restart."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from lesft.checkpoints import Checkpoint, CheckpointStore
from lesft.cohort_batch import Part
from lesft.errors import AlreadyJoined, HandshakeMismatch, InvalidInput, OutOfOrder
from lesft.micro_batch import MicroBatch, StepKey, StepResult
from lesft.v1 import training_pb2
from lesft_server.handshake import ResumePoint, resume_point
from lesft_server.run import RunState
from tests.harness import RunningServer
from tests.server.harness import (
    BASE_LENGTHS,
    RawSession,
    Snapshot,
    assert_serving,
    assert_unchanged,
    held_out_messages,
    join,
    leaving,
    make_batch,
    next_of,
    opening,
    other_batch,
    random_path,
    raw_channel,
    refusal,
    snapshot,
    step_messages,
    wait_until,
)
from tests.server.mid_run import MidRun, serving, step_all, wait_until_away, waits_for

# ---------------------------------------------------------------------- where a client goes on

CONTINUE, GO_BACK = training_pb2.COURSE_CONTINUE, training_pb2.COURSE_GO_BACK

GOES_ON: dict[str, tuple[StepKey | None, list[int], StepKey, int, ResumePoint]] = {
    # Where it stands, its checkpoints; the server's next step, its ledger's first round.
    "a new client": (None, [], StepKey(0, 0), 0, ResumePoint(StepKey(0, 0), GO_BACK)),
    "one that stands where the server does": (
        *(StepKey(2, 1), [1, 2], StepKey(2, 1), 1),
        ResumePoint(StepKey(2, 1), CONTINUE),
    ),
    "one that lacks answers of the window before": (
        *(StepKey(1, 0), [0, 1], StepKey(2, 1), 1),
        ResumePoint(StepKey(1, 0), CONTINUE),
    ),
    "one without checkpoint that lacks answers": (
        *(StepKey(0, 1), [], StepKey(0, 3), 0),
        ResumePoint(StepKey(0, 1), CONTINUE),
    ),
    "one that was started again": (
        *(None, [1, 2], StepKey(2, 1), 1),
        ResumePoint(StepKey(2, 0), GO_BACK),
    ),
    "one that was started again without checkpoint": (
        *(None, [], StepKey(0, 3), 0),
        ResumePoint(StepKey(0, 0), GO_BACK),
    ),
    "one whose newest checkpoint is damaged": (
        *(None, [1], StepKey(2, 1), 1),
        ResumePoint(StepKey(1, 0), GO_BACK),
    ),
    "one that is ahead of a server that went back": (
        *(StepKey(2, 1), [1, 2], StepKey(1, 0), 0),
        ResumePoint(StepKey(1, 0), GO_BACK),
    ),
    "one that is a single micro-batch ahead": (
        *(StepKey(1, 1), [1], StepKey(1, 0), 1),
        ResumePoint(StepKey(1, 0), GO_BACK),
    ),
    "one whose newest checkpoint is ahead": (
        *(StepKey(2, 1), [0, 2], StepKey(1, 3), 0),
        ResumePoint(StepKey(0, 0), GO_BACK),
    ),
    "one that stands before the ledger and has a later checkpoint": (
        *(StepKey(0, 1), [0, 1], StepKey(2, 0), 1),
        ResumePoint(StepKey(1, 0), GO_BACK),
    ),
}
LOST: dict[str, tuple[StepKey | None, list[int], StepKey, int, str]] = {
    "one that lost its state": (None, [], StepKey(2, 1), 1, "server 1 to 2, client 0"),
    "one that stands before the ledger": (
        *(StepKey(0, 1), [0], StepKey(2, 1), 1),
        "server 1 to 2, client 0",
    ),
    "one whose checkpoints are all ahead": (
        *(StepKey(3, 1), [2, 3], StepKey(1, 0), 0),
        "server 0 to 1, client 2,3",
    ),
}
WAY_OUT = (
    "give the client, or the server, the --state that it had before, or start everybody anew with "
    "--fresh"
)


def standing(at: StepKey | None, checkpoint_rounds: Sequence[int]) -> training_pb2.OpenSession:
    position = None if at is None else training_pb2.Position(round=at.round, micro=at.micro)
    return training_pb2.OpenSession(position=position, checkpoint_rounds=checkpoint_rounds)


def where(
    opening: training_pb2.OpenSession,
    next_key: StepKey,
    first_round: int,
    rejoins_at: int | None = None,
) -> ResumePoint:
    """The answer of a server that has all the client's answers in its ledger."""
    return resume_point(
        opening,
        lambda key: StepKey(first_round, 0) <= key <= next_key,
        first_round,
        next_key,
        lambda: rejoins_at,
    )


@pytest.mark.parametrize("who", GOES_ON)
def test_a_client_goes_on_where_it_stands_or_else_from_its_newest_checkpoint(who: str) -> None:
    at, checkpoint_rounds, next_key, first_round, expected = GOES_ON[who]
    assert where(standing(at, checkpoint_rounds), next_key, first_round) == expected


@pytest.mark.parametrize("who", LOST)
def test_a_client_that_the_others_went_on_without_rejoins_them(who: str) -> None:
    at, checkpoint_rounds, next_key, first_round, _ = LOST[who]
    point = where(standing(at, checkpoint_rounds), next_key, first_round, rejoins_at=4)
    assert point == ResumePoint(StepKey(4, 0), training_pb2.COURSE_REJOIN)


@pytest.mark.parametrize("who", LOST)
def test_a_client_that_the_server_has_no_answers_for_is_refused(who: str) -> None:
    at, checkpoint_rounds, next_key, first_round, both = LOST[who]
    with pytest.raises(HandshakeMismatch) as caught:
        where(standing(at, checkpoint_rounds), next_key, first_round)
    assert str(caught.value) == f"checkpoint_rounds: {both}; {WAY_OUT}"


# ---------------------------------------------------------------------- what it gets again


def test_a_repeated_micro_batch_gets_the_same_answer_without_a_step(
    model: Path, tmp_path: Path, after_round_0: Snapshot
) -> None:
    first, second = StepKey(0, 0), StepKey(0, 1)
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        a, b = (join(channel, server.spec, name) for name in "ab")
        for session in (a, b):
            session.send(*step_messages(make_batch(first)))
        a.receive_answer()
        given = b.receive_answer()
        before = snapshot(server)
        for _ in range(2):
            b.call.cancel()
            wait_until_away(server, "b")
            b = join(channel, server.spec, "b", first)
            b.send(*step_messages(make_batch(first)))
            assert b.receive_answer() == given
        assert_unchanged(server, before)
        assert server.engine.run.steps == 1
        step_all([a, b], second)
        assert_unchanged(server, after_round_0)


def test_a_client_that_was_started_again_without_checkpoint_gets_all_answers_again(
    mid_run: MidRun, after_round_0: Snapshot
) -> None:
    mid_run.b.call.cancel()
    wait_until_away(mid_run.server, "b")
    mid_run.b = RawSession(mid_run.channel)
    mid_run.b.send(opening(mid_run.server.spec, "b", instance_id="after the crash"))
    opened = mid_run.b.receive().opened
    assert (next_of(opened), opened.course) == (StepKey(0, 0), training_pb2.COURSE_GO_BACK)
    mid_run.b.send(*step_messages(make_batch(StepKey(0, 0))))
    assert mid_run.b.receive_step().micro == 0
    assert mid_run.server.engine.run.steps == 1
    mid_run.end_round()
    assert_unchanged(mid_run.server, after_round_0)


def other_activations(key: StepKey) -> MicroBatch:
    return replace(make_batch(key), base=random_path(BASE_LENGTHS, seed=9))


@pytest.mark.parametrize("other", [other_batch, other_activations])
@pytest.mark.parametrize(("name", "key"), [("b", StepKey(0, 0)), ("a", MidRun.at)])
def test_another_content_under_the_same_key_is_a_fork_and_refused(
    name: str,
    key: StepKey,
    other: Callable[[StepKey], MicroBatch],
    mid_run: MidRun,
    after_round_0: Snapshot,
) -> None:
    """One key was answered already, the other one's part still waits for the others."""
    forked = mid_run.come_back(name, key)
    forked.send(*step_messages(other(key)))
    assert forked.refusal() == refusal(
        OutOfOrder,
        f"client {name!r} sent {key} with other activations or labels before: a client must not "
        "fork; start it with the same data, --device, --precision and --threads as before",
    )
    wait_until_away(mid_run.server, name)
    assert_unchanged(mid_run.server, mid_run.before)
    right = mid_run.come_back(name, MidRun.at)
    setattr(mid_run, name, right)
    if name == "a":
        right.send(*step_messages(make_batch(MidRun.at)))
    mid_run.end_round()
    assert_unchanged(mid_run.server, after_round_0)


@pytest.mark.parametrize("key", [StepKey(0, 0), StepKey(1, 0)], ids=["before", "after"])
def test_a_client_that_is_back_must_go_on_where_it_said_it_stands(
    key: StepKey, mid_run: MidRun, after_round_0: Snapshot
) -> None:
    mid_run.b = mid_run.come_back("b", mid_run.at)
    mid_run.b.send(*step_messages(make_batch(key)))
    message = f"round 0 micro-batch 1 is due, got {key}: each must come once and in order"
    assert mid_run.b.refusal() == refusal(OutOfOrder, message)
    mid_run.assert_waits_for_b(message, after_round_0)


def test_a_part_that_came_before_its_client_broke_off_is_trained_on_without_it(
    mid_run: MidRun, after_round_0: Snapshot
) -> None:
    server = mid_run.server
    mid_run.a.call.cancel()
    wait_until_away(server, "a")
    mid_run.b.send(*step_messages(make_batch(mid_run.at)))
    assert mid_run.b.receive_step().micro == 1
    assert_unchanged(server, after_round_0)
    # The next step has to wait for it, and its answer waits in the ledger.
    mid_run.b.send(*step_messages(make_batch(StepKey(1, 0))))
    wait_until(lambda: server.engine.cohort.due() == ["a"])
    assert waits_for(server).startswith("client 'a' to come back")
    a = mid_run.come_back("a", mid_run.at)
    a.send(*step_messages(make_batch(mid_run.at)))
    header, data = a.receive_answer()
    assert (header.round, header.micro, header.checkpoint) == (0, 1, True)
    assert len(data) > 1000
    assert server.engine.run.steps == 2
    assert_unchanged(server, after_round_0)
    a.send(*step_messages(make_batch(StepKey(1, 0))))
    for session in (a, mid_run.b):
        assert session.receive_step().round == 1


def test_the_last_step_is_taken_although_its_client_breaks_off_meanwhile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serving(model, tmp_path, rounds=1, accumulation=1) as server,
        raw_channel(server.grpc) as channel,
    ):
        back, started, release = server.engine.back, threading.Event(), threading.Event()
        train_step = back.train_step

        def slow(key: StepKey, parts: Sequence[Part]) -> list[StepResult]:
            started.set()
            assert release.wait(20)
            return train_step(key, parts)

        monkeypatch.setattr(back, "train_step", slow)
        key = StepKey(0, 0)
        a, b = (join(channel, server.spec, name) for name in "ab")
        for session in (a, b):
            session.send(*step_messages(make_batch(key)))
        try:
            assert started.wait(20)
            b.call.cancel()
            wait_until_away(server, "b")
        finally:
            release.set()
        assert a.receive_step().checkpoint
        assert server.engine.run.state is RunState.FINISHED
        assert (tmp_path / "adapter.safetensors").exists()
        # It may come back for its answer, and to score what it kept aside.
        b = join(channel, server.spec, "b", key)
        b.send(*step_messages(make_batch(key)))
        assert b.receive_step().checkpoint
        for session in (a, b):
            session.send(*held_out_messages())
            assert min(session.receive().held_out.nll_sums) > 0
            session.send(leaving())
            assert session.rest() == []
        assert_serving(server)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("comes_back", [False, True])
def test_nobody_has_the_last_answer_of_a_round_before_its_checkpoint_is_on_disk(
    comes_back: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, release = threading.Event(), threading.Event()
    save = CheckpointStore.save

    def slow(store: CheckpointStore, checkpoint: Checkpoint) -> None:
        writing.set()
        assert release.wait(20)
        save(store, checkpoint)

    monkeypatch.setattr(CheckpointStore, "save", slow)
    key = StepKey(0, 1)
    options = {"clients": 1, "heartbeat_seconds": 0.05}
    with serving(model, tmp_path, **options) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "a", instance_id="phone")
        step_all([session], StepKey(0, 0))
        session.send(*step_messages(make_batch(key)))
        try:
            assert writing.wait(20)
            if comes_back:
                session = join(channel, server.spec, "a", key, instance_id="phone")
                session.send(*step_messages(make_batch(key)))
            for _ in range(4):
                session.receive_heartbeat()
        finally:
            release.set()
        assert session.receive_step().checkpoint
        assert (tmp_path / "checkpoints" / "round-000001").is_dir()


def test_the_others_do_not_outrun_a_client_that_has_to_go_back_a_whole_window(
    model: Path, tmp_path: Path
) -> None:
    """Its parts of round 1 are there already when it comes back with its newest checkpoint lost."""
    with serving(model, tmp_path, rounds=3) as server, raw_channel(server.grpc) as channel:
        a, b = (join(channel, server.spec, name) for name in "ab")
        train(server, [a, b], 0)
        for micro in range(2):
            a.send(*step_messages(make_batch(StepKey(1, micro))))
        wait_until(lambda: server.engine.run.members["a"].next_key == StepKey(2, 0))
        a.call.cancel()
        wait_until_away(server, "a")
        a, at = join_back(channel, server, "a", None, [0])
        assert at == StepKey(0, 0)
        for micro in range(2):
            b.send(*step_messages(make_batch(StepKey(1, micro))))
        wait_until(lambda: "a" in server.engine.cohort.due())
        for round_index in range(2):
            for micro in range(2):
                a.send(*step_messages(make_batch(StepKey(round_index, micro))))
            assert [a.receive_step().micro for _ in range(2)] == [0, 1]
        assert [b.receive_step().micro for _ in range(2)] == [0, 1]


# ---------------------------------------------------------------------- who may come back

TAKEN_OVER = refusal(AlreadyJoined, "client 'a' has opened another session")


def test_a_client_takes_over_its_session_that_is_still_open(
    mid_run: MidRun, after_round_0: Snapshot
) -> None:
    old = mid_run.a
    mid_run.a = mid_run.come_back("a", mid_run.at)
    assert old.refusal() == TAKEN_OVER
    member = mid_run.server.engine.run.members["a"]
    assert (member.connected, member.resumed) == (True, 1)
    mid_run.a.send(*step_messages(make_batch(mid_run.at)))
    mid_run.end_round()
    assert_unchanged(mid_run.server, after_round_0)


def test_a_client_takes_over_its_session_before_the_start_too(model: Path, tmp_path: Path) -> None:
    key = StepKey(0, 0)
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        old = join(channel, server.spec, "a", instance_id="phone")
        old.send(*step_messages(make_batch(key)))
        wait_until(lambda: server.engine.run.members["a"].next_key == StepKey(0, 1))
        # What was sent in a session that has ended before the start is forgotten.
        new = join(channel, server.spec, "a", key, instance_id="phone")
        assert old.refusal() == TAKEN_OVER
        assert list(server.engine.run.members) == ["a"]
        assert server.engine.run.state is RunState.WAITING
        b = join(channel, server.spec, "b")
        b.send(*step_messages(make_batch(key)))
        wait_until(lambda: server.engine.cohort.due() == ["a"])
        new.send(*step_messages(make_batch(key)))
        for session in (new, b):
            assert session.receive_step().round == 0


@pytest.mark.parametrize(
    ("first", "second"), [("phone", "tablet"), ("phone", ""), ("", "phone"), ("", "")]
)
def test_another_instance_cannot_take_an_open_session_over(
    first: str, second: str, model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path, clients=1) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "a", instance_id=first)
        intruder = RawSession(channel)
        intruder.send(opening(server.spec, "a", instance_id=second))
        assert intruder.refusal() == refusal(
            AlreadyJoined,
            "client_id: 'a' is in the run already; give every client a --client-id of its own",
        )
        step_all([session], StepKey(0, 0))
        # It may once the session is over, and from then on the name is its.
        session.call.cancel()
        wait_until_away(server, "a")
        step_all([join(channel, server.spec, "a", StepKey(0, 1), instance_id=second)], MidRun.at)
        assert server.engine.run.members["a"].instance_id == second


def test_a_client_that_is_back_with_other_data_is_refused(
    mid_run: MidRun, after_round_0: Snapshot
) -> None:
    mid_run.b.send(leaving("more data"))
    assert mid_run.b.rest() == []
    back = RawSession(mid_run.channel)
    back.send(opening(mid_run.server.spec, "b", num_samples=2))
    assert back.refusal() == refusal(
        HandshakeMismatch,
        "num_samples: server 1, client 2; the data of 'b' must stay the same in mid-run",
    )
    mid_run.assert_waits_for_b("more data", after_round_0)


# ---------------------------------------------------------------------- a server that is restarted


@contextmanager
def clients_of(
    model: Path, state: Path, **options: object
) -> Iterator[tuple[RunningServer, grpc.Channel]]:
    with serving(model, state, **options) as server, raw_channel(server.grpc) as channel:
        yield server, channel


def train(server: RunningServer, sessions: list[RawSession], *rounds: int) -> None:
    for round_index in rounds:
        for micro in range(server.spec.accumulation):
            step_all(sessions, StepKey(round_index, micro))


def join_back(
    channel: grpc.Channel, server: RunningServer, name: str, at: StepKey | None, rounds: list[int]
) -> tuple[RawSession, StepKey]:
    """A session that the server sends back to a checkpoint, and where it is to go on."""
    session = RawSession(channel)
    position = standing(at, rounds).position if at else None
    session.send(opening(server.spec, name, position=position, checkpoint_rounds=rounds))
    opened = session.receive().opened
    assert opened.course == training_pb2.COURSE_GO_BACK
    return session, next_of(opened)


@pytest.fixture(scope="module")
def undisturbed(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Snapshot, str, bytes]:
    """The model, the lineage and the adapter file after a run that nothing disturbs."""
    state = tmp_path_factory.mktemp("state")
    with clients_of(model, state) as (server, channel):
        train(server, [join(channel, server.spec, name) for name in "ab"], 0, 1)
        adapter = (state / "adapter.safetensors").read_bytes()
        return snapshot(server), server.engine.run.lineage, adapter


def test_a_server_that_is_started_again_goes_on_from_its_newest_checkpoint(
    model: Path, tmp_path: Path, undisturbed: tuple[Snapshot, str, bytes]
) -> None:
    with clients_of(model, tmp_path) as (server, channel):
        sessions = [join(channel, server.spec, name) for name in "ab"]
        train(server, sessions, 0)
        step_all(sessions, StepKey(1, 0))  # lost with the server
    with clients_of(model, tmp_path) as (server, channel):
        run = server.engine.run
        assert run.state is RunState.TRAINING
        assert ([record.round for record in run.rounds], run.steps) == ([0], 2)
        why = "to come back (the server was started again)"
        assert waits_for(server) == f"client 'a' {why}; client 'b' {why}"
        a, at = join_back(channel, server, "a", StepKey(1, 1), [0, 1])
        assert at == StepKey(1, 0)
        b = join(channel, server.spec, "b", StepKey(1, 0))  # has no answer of what was lost
        train(server, [a, b], 1)
        assert run.state is RunState.FINISHED
        model_after, lineage, adapter = undisturbed
        assert_unchanged(server, model_after)
        assert run.lineage == lineage
    assert (tmp_path / "adapter.safetensors").read_bytes() == adapter


def test_answers_from_before_the_checkpoint_outlive_the_server(model: Path, tmp_path: Path) -> None:
    keys = [StepKey(0, 0), StepKey(0, 1)]
    with clients_of(model, tmp_path) as (server, channel):
        a, b = (join(channel, server.spec, name) for name in "ab")
        for session in (a, b):
            for key in keys:
                session.send(*step_messages(make_batch(key)))
        given = [b.receive_answer() for _ in keys]
        assert [header.checkpoint for header, _ in given] == [False, True]
    with clients_of(model, tmp_path) as (server, channel):
        before = snapshot(server)
        b, at = join_back(channel, server, "b", None, [0])
        assert at == StepKey(0, 0)
        for key in keys:
            b.send(*step_messages(make_batch(key)))
        assert [b.receive_answer() for _ in keys] == given
        assert server.engine.run.steps == 2
        assert_unchanged(server, before)


def test_a_server_without_a_checkpoint_starts_anew(model: Path, tmp_path: Path) -> None:
    with clients_of(model, tmp_path) as (server, channel):
        fresh = snapshot(server)
        step_all([join(channel, server.spec, name) for name in "ab"], StepKey(0, 0))
    with clients_of(model, tmp_path) as (server, channel):
        assert server.engine.run.state is RunState.WAITING
        assert_unchanged(server, fresh)
        _, at = join_back(channel, server, "a", StepKey(0, 1), [])
        assert at == StepKey(0, 0)


def test_a_server_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    model: Path, tmp_path: Path
) -> None:
    options = {"rounds": 3, "clients": 1}
    with clients_of(model, tmp_path, **options) as (server, channel):
        session = join(channel, server.spec, "a")
        train(server, [session], 0)
        after_first = snapshot(server)
        train(server, [session], 1)
    newest = tmp_path / "checkpoints" / "round-000002" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x55")
    with clients_of(model, tmp_path, **options) as (server, channel):
        assert [record.round for record in server.engine.run.rounds] == [0]
        assert_unchanged(server, after_first)
        session, at = join_back(channel, server, "a", StepKey(2, 0), [1, 2])
        assert at == StepKey(1, 0)
        train(server, [session], 1, 2)
        assert server.engine.run.state is RunState.FINISHED


def test_a_server_that_had_finished_is_finished_and_scores(model: Path, tmp_path: Path) -> None:
    with clients_of(model, tmp_path, clients=1) as (server, channel):
        session = join(channel, server.spec, "a")
        train(server, [session], 0, 1)
        session.send(*held_out_messages())
        scores = session.receive().held_out
    with clients_of(model, tmp_path, clients=1) as (server, channel):
        assert server.engine.run.state is RunState.FINISHED
        session = join(channel, server.spec, "a", StepKey(2, 0))
        session.send(*held_out_messages())
        assert session.receive().held_out == scores
        session.send(*step_messages(make_batch(StepKey(2, 0))))
        assert session.refusal() == refusal(
            OutOfOrder, "round 2 micro-batch 0: the run has only 2 rounds"
        )
        assert server.engine.run.state is RunState.FINISHED


def test_a_run_that_a_failed_step_stopped_goes_on_when_its_server_is_started_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[StepResult]:
        raise RuntimeError("CUDA out of memory")

    with clients_of(model, tmp_path, clients=1) as (server, channel):
        session = join(channel, server.spec, "a")
        train(server, [session], 0)
        monkeypatch.setattr(server.engine.back, "train_step", fail)
        session.send(*step_messages(make_batch(StepKey(1, 0))))
        session.refusal()
        assert server.engine.run.state is RunState.STOPPED
    with clients_of(model, tmp_path, clients=1) as (server, channel):
        train(server, [join(channel, server.spec, "a", StepKey(1, 0))], 1)
        assert server.engine.run.state is RunState.FINISHED


def test_a_state_folder_of_another_run_is_refused_unless_it_is_to_be_dropped(
    model: Path, tmp_path: Path
) -> None:
    with clients_of(model, tmp_path, clients=1) as (server, channel):
        train(server, [join(channel, server.spec, "a")], 0)
    with (
        pytest.raises(InvalidInput, match=r"belongs to a run with other settings: .*--fresh"),
        serving(model, tmp_path, clients=1, seed=8),
    ):
        pass
    with clients_of(model, tmp_path, clients=1, seed=8, fresh=True) as (server, channel):
        assert server.engine.run.state is RunState.WAITING
        train(server, [join(channel, server.spec, "a")], 0)


def test_two_servers_cannot_share_a_state_folder(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server:
        with pytest.raises(InvalidInput) as caught, serving(model, tmp_path):
            pass
        assert str(caught.value) == (
            f"--state {tmp_path} is in use by another server: stop that one, or use another folder"
        )
        assert_serving(server)
