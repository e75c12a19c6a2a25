"""The link to the server: streams come and go, and every request is answered once and in order."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from lesft.channel import open_channel
from lesft.errors import (
    STATUS,
    BundleError,
    HandshakeMismatch,
    LeftBehind,
    LesftError,
    OutOfOrder,
    RunStopped,
    Unreachable,
)
from lesft.micro_batch import Path, StepKey, Targets
from lesft.v1 import training_pb2
from lesft.wire import WireCounter
from lesft_client.back import GoBack, Rejoin
from lesft_client.link import Patience, ServerLink
from tests.client.fake_server import (
    LIMITS,
    SECONDS,
    Call,
    FakeServer,
    Response,
    Script,
    answer,
    fake_server,
    heartbeat,
    make_batch,
    opened,
)

PATIENT = Patience(SECONDS, SECONDS, SECONDS)
GONE = Unreachable("the connection is gone")


def make_link(
    address: str,
    patience: Patience = PATIENT,
    checkpoints: Callable[[], list[int]] = list,
    on_turn: Callable[[], None] = lambda: None,
    on_waiting: Callable[[str], None] = lambda waiting_for: None,
) -> ServerLink:
    return ServerLink(
        lambda: open_channel(address),
        training_pb2.OpenSession(client_id="a"),
        LIMITS,
        "server s:1",
        WireCounter(),
        patience,
        checkpoints,
        on_turn,
        on_waiting,
    )


@contextmanager
def linked(*scripts: Script, round_index: int = 0) -> Iterator[tuple[FakeServer, ServerLink]]:
    """A link that stands at a round's beginning, with a server that follows the scripts."""
    with fake_server(*scripts) as (fake, address):
        link = make_link(address)
        try:
            turn = link.open()
            assert (type(turn), turn.round) == (GoBack, round_index)
            link.resume(round_index)
            yield fake, link
        finally:
            link.close()


def received(link: ServerLink, count: int) -> list[tuple[StepKey, float]]:
    results = [link.receive() for _ in range(count)]
    return [(result.key, result.loss) for result in results]


def position(call: Call) -> tuple[int, int] | None:
    at = call.opening.position
    return (at.round, at.micro) if call.opening.HasField("position") else None


def silent(call: Call) -> Iterator[Response]:
    yield opened()
    call.fall_silent()


# ---------------------------------------------------------------------- an unbroken stream


def test_answers_come_in_the_order_of_the_requests_and_a_leave_ends_the_stream() -> None:
    def script(call: Call) -> Iterator[Response]:
        yield opened(3)
        assert call.held_out() == 1
        yield Response(held_out=training_pb2.HeldOutResult(nll_sums=[1.5]))
        keys = [call.key(), call.key()]
        for key in keys:
            yield from answer(key, checkpoint=key.micro == 1)
        call.until_leave()

    with linked(script, round_index=3) as (fake, link):
        batch = make_batch(3)
        assert link.score(batch.base, batch.targets) == [1.5]
        link.send(batch)
        link.send(make_batch(3, 1))
        first, second = link.receive(), link.receive()
        assert (first.key, second.key) == (StepKey(3, 0), StepKey(3, 1))
        assert torch.equal(first.base_gradient_ND, torch.full((2, 4), 3.0))
        assert (first.checkpoint, second.checkpoint) == (False, True)
        link.check()
        link.leave("done")
        assert fake.calls[0].left == "done"
        assert link.reconnects == 0


@pytest.mark.parametrize("kind", [kind for kind in STATUS if not issubclass(kind, Unreachable)])
def test_a_refused_opening_is_that_error_and_not_tried_again(kind: type[LesftError]) -> None:
    def refuse(call: Call) -> Iterator[Response]:
        call.fail(kind("no"))
        yield opened()

    with fake_server(refuse) as (_, address):
        link = make_link(address)
        with pytest.raises(kind, match="server s:1: no") as caught:
            link.open()
        assert type(caught.value) is kind
        link.leave("nothing was opened")


def test_a_server_that_is_never_there_is_given_up_after_the_first_contacts_patience() -> None:
    link = make_link("127.0.0.1:1", Patience(first_contact=0.3, reconnect=600, stall=600))
    start = time.monotonic()
    with pytest.raises(Unreachable, match="--patience-seconds waits longer"):
        link.open()
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------------- streams that break


@pytest.mark.parametrize("end", ["an error", "a close without leave"])
def test_what_was_not_answered_is_sent_again_and_answers_come_once(end: str) -> None:
    def breaks(call: Call) -> Iterator[Response]:
        yield opened()
        keys = [call.key(), call.key()]
        yield from answer(keys[0], loss=1)
        if end == "an error":
            call.fail(GONE)

    def goes_on(call: Call) -> Iterator[Response]:
        assert position(call) == (0, 1)
        yield opened(0, 1, continues=True)
        for _ in range(3):
            yield from answer(call.key(), loss=2)
        call.until_leave()

    with linked(breaks, goes_on) as (_, link):
        link.send(make_batch(0))
        link.send(make_batch(0, 1))
        assert received(link, 2) == [(StepKey(0, 0), 1), (StepKey(0, 1), 2)]
        for micro in (0, 1):
            link.send(make_batch(1, micro))
        assert received(link, 2) == [(StepKey(1, 0), 2), (StepKey(1, 1), 2)]
        assert link.reconnects == 1
        link.leave("")


def test_an_answer_that_broke_off_in_the_middle_is_asked_for_again() -> None:
    def breaks(call: Call) -> Iterator[Response]:
        yield opened()
        header, *_ = answer(call.key(), loss=1)
        yield header
        call.fail(GONE)

    def goes_on(call: Call) -> Iterator[Response]:
        assert position(call) == (0, 0)
        yield opened(0, 0, continues=True)
        yield from answer(call.key(), loss=2)
        call.fall_silent()

    with linked(breaks, goes_on) as (_, link):
        link.send(make_batch(0))
        assert received(link, 1) == [(StepKey(0, 0), 2)]


def test_held_out_samples_are_scored_again_on_a_new_stream() -> None:
    def breaks(call: Call) -> Iterator[Response]:
        yield opened()
        call.held_out()
        call.fail(GONE)

    def goes_on(call: Call) -> Iterator[Response]:
        yield opened(0, 0, continues=True)
        call.held_out()
        yield Response(held_out=training_pb2.HeldOutResult(nll_sums=[0.5]))
        call.fall_silent()

    with linked(breaks, goes_on) as (_, link):
        batch = make_batch(0)
        assert link.score(batch.base, batch.targets) == [0.5]


def test_a_stream_may_break_again_and_again_and_the_server_may_be_away_for_a_while() -> None:
    def breaks(call: Call) -> Iterator[Response]:
        yield opened(0, 0, continues=True)
        call.key()
        call.fail(GONE)

    def is_away(call: Call) -> Iterator[Response]:
        call.fail(GONE)
        yield opened()

    def goes_on(call: Call) -> Iterator[Response]:
        yield opened(0, 0, continues=True)
        yield from answer(call.key())
        call.fall_silent()

    with linked(breaks, breaks, is_away, breaks, goes_on) as (_, link):
        link.send(make_batch(0))
        assert received(link, 1) == [(StepKey(0, 0), 0)]
        assert link.reconnects == 3


def test_what_is_sent_while_there_is_no_stream_waits_for_the_next_one() -> None:
    broken, sent = threading.Event(), threading.Event()

    def breaks(call: Call) -> Iterator[Response]:
        yield opened()
        call.key()
        call.fail(GONE)

    def goes_on(call: Call) -> Iterator[Response]:
        broken.set()
        assert sent.wait(SECONDS)
        yield opened(0, 0, continues=True)
        for loss in (1, 2):
            yield from answer(call.key(), loss)
        call.fall_silent()

    with linked(breaks, goes_on) as (_, link):
        link.send(make_batch(0))
        assert broken.wait(SECONDS)
        link.send(make_batch(0, 1))
        sent.set()
        assert received(link, 2) == [(StepKey(0, 0), 1), (StepKey(0, 1), 2)]


def test_a_server_that_stays_away_ends_it_with_the_option_that_waits_longer() -> None:
    def breaks(call: Call) -> Iterator[Response]:
        yield opened()
        call.key()

    turned = threading.Event()
    with fake_server(breaks) as (_, address):
        patience = Patience(first_contact=SECONDS, reconnect=0.3, stall=SECONDS)
        link = make_link(address, patience, on_turn=turned.set)
        link.resume(link.open().round)
        link._connect = lambda: open_channel("127.0.0.1:1")
        link.send(make_batch(0))
        with pytest.raises(Unreachable, match="--reconnect-seconds waits longer"):
            link.receive()
        assert turned.is_set()
        with pytest.raises(Unreachable):
            link.check()


# ---------------------------------------------------------------------- going back


def test_a_server_that_went_back_voids_what_was_sent_before() -> None:
    turned = threading.Event()

    def breaks(call: Call) -> Iterator[Response]:
        assert list(call.opening.checkpoint_rounds) == [2, 4]
        assert position(call) is None
        yield opened(4)
        yield from answer(call.key(), loss=1)
        call.key()
        call.fail(GONE)

    def went_back(call: Call) -> Iterator[Response]:
        assert list(call.opening.checkpoint_rounds) == [2, 4]
        assert position(call) == (4, 1)
        yield opened(2)
        for loss in (3, 4):
            yield from answer(call.key(), loss)
        call.fall_silent()

    with fake_server(breaks, went_back) as (_, address):
        link = make_link(address, checkpoints=lambda: [2, 4], on_turn=turned.set)
        link.resume(link.open().round)
        link.send(make_batch(4))
        link.send(make_batch(4, 1))
        assert received(link, 1) == [(StepKey(4, 0), 1)]
        for again in (link.receive, link.receive, link.check, lambda: link.send(make_batch(5))):
            with pytest.raises(GoBack) as caught:
                again()
            assert caught.value.round == 2
        assert turned.is_set()
        link.resume(2)
        link.check()
        link.send(make_batch(2))
        link.send(make_batch(2, 1))
        assert received(link, 2) == [(StepKey(2, 0), 3), (StepKey(2, 1), 4)]
        link.close()


def test_a_client_that_was_left_behind_is_told_where_the_others_are() -> None:
    def breaks(call: Call) -> Iterator[Response]:
        yield opened()
        call.key()
        call.fail(LeftBehind("client 'a' was late"))

    def went_on(call: Call) -> Iterator[Response]:
        assert position(call) == (0, 0)
        response = opened(3)
        response.opened.course = training_pb2.COURSE_REJOIN
        yield response
        yield from answer(call.key())
        call.fall_silent()

    with linked(breaks, went_on) as (_, link):
        link.send(make_batch(0))
        with pytest.raises(Rejoin) as caught:
            link.receive()
        assert caught.value.round == 3
        link.resume(3)
        link.send(make_batch(3))
        assert received(link, 1) == [(StepKey(3, 0), 0)]


def test_resuming_at_another_round_than_the_server_wants_by_then_raises() -> None:
    release = threading.Event()

    def breaks(call: Call) -> Iterator[Response]:
        yield opened(4)
        assert release.wait(SECONDS)
        call.fail(GONE)

    def went_back(call: Call) -> Iterator[Response]:
        assert position(call) is None, "it has not begun, so it stands nowhere"
        yield opened(2)
        yield from answer(call.key())
        call.fall_silent()

    turned = threading.Event()
    with fake_server(breaks, went_back) as (_, address):
        link = make_link(address, on_turn=turned.set)
        assert link.open().round == 4
        release.set()
        assert turned.wait(SECONDS)
        with pytest.raises(GoBack) as caught:
            link.resume(4)
        link.resume(caught.value.round)
        link.send(make_batch(2))
        assert received(link, 1) == [(StepKey(2, 0), 0)]
        link.close()


# ---------------------------------------------------------------------- what ends it


def ends_with(error: LesftError) -> Script:
    def script(call: Call) -> Iterator[Response]:
        yield opened()
        call.key()
        call.fail(error)

    return script


def nobody_asked(call: Call) -> Iterator[Response]:
    yield opened()
    call.key()
    yield from answer(StepKey(0, 0))
    yield from answer(StepKey(0, 0))
    call.fall_silent()


def wrong_key(call: Call) -> Iterator[Response]:
    yield opened()
    call.key()
    yield from answer(StepKey(0, 1))
    call.fall_silent()


def wrong_kind(call: Call) -> Iterator[Response]:
    yield opened()
    call.key()
    yield Response(held_out=training_pb2.HeldOutResult(nll_sums=[1]))
    call.fall_silent()


def chunk_missing(call: Call) -> Iterator[Response]:
    yield opened()
    header, *_ = answer(call.key())
    yield header
    yield header
    call.fall_silent()


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (ends_with(RunStopped("the run has ended")), RunStopped, "the run has ended"),
        (ends_with(BundleError("not finite")), BundleError, "not finite"),
        (nobody_asked, OutOfOrder, "sent an answer that nobody asked for"),
        (wrong_key, BundleError, "result of round 0 micro-batch 0 expected, got that of round 0"),
        (wrong_kind, OutOfOrder, "sent held_out where another answer was due"),
        (chunk_missing, BundleError, "chunk 0 is missing"),
    ],
)
def test_an_error_reaches_every_call_and_whoever_waits_elsewhere(
    script: Script, kind: type[LesftError], message: str
) -> None:
    checked: list[LesftError] = []
    turned = threading.Event()

    def on_turn() -> None:
        try:
            link.check()
        except LesftError as error:
            checked.append(error)
        turned.set()

    with fake_server(script) as (_, address):
        link = make_link(address, on_turn=on_turn)
        link.resume(link.open().round)
        link.send(make_batch(0))
        assert turned.wait(SECONDS)
        calls: list[Callable[[], object]] = [
            lambda: received(link, 2),
            link.receive,
            link.check,
            lambda: link.send(make_batch(0, 1)),
            lambda: link.score(Path(torch.ones(1, 4), (1,)), Targets(torch.ones(1).long(), (1,))),
            lambda: link.resume(0),
        ]
        for call in calls:
            with pytest.raises(kind, match=message) as caught:
                call()
            assert type(caught.value) is kind
        assert [type(error) for error in checked] == [kind]
        assert link.reconnects == 0
        link.leave("it broke")


def test_a_refusal_to_take_the_client_back_ends_it() -> None:
    def breaks(call: Call) -> Iterator[Response]:
        yield opened()
        call.key()

    def refuse(call: Call) -> Iterator[Response]:
        call.fail(HandshakeMismatch("checkpoint_rounds: server 3 to 4, client 0"))
        yield opened()

    with linked(breaks, refuse) as (_, link):
        link.send(make_batch(0))
        with pytest.raises(HandshakeMismatch, match="server 3 to 4, client 0"):
            link.receive()


# ---------------------------------------------------------------------- leaving


def test_a_client_that_cannot_use_an_answer_tells_its_server_why_it_goes() -> None:
    def script(call: Call) -> Iterator[Response]:
        yield opened()
        call.key()
        yield from answer(StepKey(0, 1))
        call.until_leave()

    with linked(script) as (fake, link):
        link.send(make_batch(0))
        with pytest.raises(BundleError):
            link.receive()
        link.leave("it broke")
        fake.wait_until_over(1, seconds=2)
        assert fake.calls[0].left == "it broke"


def test_leaving_while_the_server_is_away_returns_at_once_and_ends_the_trying() -> None:
    def breaks(call: Call) -> Iterator[Response]:
        yield opened()
        call.key()

    with fake_server(breaks) as (fake, address):
        link = make_link(address)
        link.resume(link.open().round)
        link._connect = lambda: open_channel("127.0.0.1:1")
        link.send(make_batch(0))
        fake.wait_until_over(1)
        while link._stream is not None:
            time.sleep(0.01)
        start = time.monotonic()
        link.leave("stopped by its user")
        assert time.monotonic() - start < 1
        link._keeper.join(SECONDS)
        assert not link._keeper.is_alive()
        link.check()  # leaving is no failure


def test_leaving_a_server_that_does_not_read_takes_only_a_few_seconds() -> None:
    with linked(silent) as (_, link):
        start = time.monotonic()
        link.leave("")
        assert 2 < time.monotonic() - start < 5


def test_closing_wakes_nobody_with_an_error_and_opens_no_other_stream() -> None:
    turned = threading.Event()
    with fake_server(silent) as (_, address):
        link = make_link(address, on_turn=turned.set)
        link.resume(link.open().round)
        link.close()
        link._keeper.join(SECONDS)
        assert not link._keeper.is_alive()
        assert not turned.is_set()
        assert link.reconnects == 0


# ---------------------------------------------------------------------- silence and heartbeats


def test_a_server_that_falls_silent_is_given_up_for_a_new_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def falls_silent(call: Call) -> Iterator[Response]:
        yield opened(heartbeat_seconds=0.1)
        call.key()
        call.fall_silent()

    def goes_on(call: Call) -> Iterator[Response]:
        yield opened(0, 0, continues=True)
        yield from answer(call.key())
        call.fall_silent()

    with fake_server(falls_silent, goes_on) as (_, address):
        link = make_link(address, Patience(SECONDS, SECONDS, stall=0.5))
        link.resume(link.open().round)
        start = time.monotonic()
        link.send(make_batch(0))
        assert received(link, 1) == [(StepKey(0, 0), 0)]
        assert 0.4 < time.monotonic() - start < 5
        assert link.reconnects == 1
        link.close()
    assert "server s:1: nothing was heard of it for 0.5 s: the connection is lost" in caplog.text


def test_a_port_that_takes_connections_and_says_nothing_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        link = make_link(f"127.0.0.1:{port}", Patience(first_contact=0.3, reconnect=1, stall=0.3))
        with pytest.raises(Unreachable, match=r"nothing was heard of it for 0\.3 s \(tried for"):
            link.open()


def test_heartbeats_keep_a_slow_server_and_say_what_it_waits_for() -> None:
    heard: list[str] = []

    def slow(call: Call) -> Iterator[Response]:
        yield opened(heartbeat_seconds=0.1)
        key = call.key()
        for waiting_for in ("b, c", "b, c", "c", "c", "c", "", ""):
            time.sleep(0.2)
            yield heartbeat(waiting_for)
        yield from answer(key)
        call.fall_silent()

    with fake_server(slow) as (_, address):
        link = make_link(address, Patience(SECONDS, SECONDS, stall=0.6), on_waiting=heard.append)
        link.resume(link.open().round)
        link.send(make_batch(0))
        assert received(link, 1) == [(StepKey(0, 0), 0)]
        assert heard == ["b, c", "b, c", "c", "c", "c", "", "", ""]
        assert link.reconnects == 0
        link.close()


def test_what_the_server_waited_for_is_forgotten_once_it_has_answered() -> None:
    heard: list[str] = []

    def slow(call: Call) -> Iterator[Response]:
        yield opened()
        key = call.key()
        yield heartbeat("client b")
        yield from answer(key)
        call.fall_silent()

    with fake_server(slow) as (_, address):
        link = make_link(address, on_waiting=heard.append)
        try:
            link.resume(link.open().round)
            link.send(make_batch(0))
            link.receive()
            assert heard == ["client b", ""]
        finally:
            link.close()


def test_a_server_whose_heartbeats_are_rarer_than_the_patience_is_not_taken_for_dead() -> None:
    def slow(call: Call) -> Iterator[Response]:
        yield opened(heartbeat_seconds=0.4)
        key = call.key()
        time.sleep(0.8)
        yield from answer(key)
        call.fall_silent()

    with fake_server(slow) as (_, address):
        link = make_link(address, Patience(SECONDS, SECONDS, stall=0.2))
        link.resume(link.open().round)
        link.send(make_batch(0))
        assert received(link, 1) == [(StepKey(0, 0), 0)]
        assert link.reconnects == 0
        link.close()


def test_the_client_sends_heartbeats_as_often_as_the_server_says_once_it_has_sent_something() -> (
    None
):
    def counts(call: Call) -> Iterator[Response]:
        yield opened(heartbeat_seconds=0.1)
        key = call.key()
        pool = ThreadPoolExecutor(1)
        rest = pool.submit(call.until_leave)
        time.sleep(1)
        yield from answer(key)
        rest.result(SECONDS)
        pool.shutdown()

    with linked(counts) as (fake, link):
        link.send(make_batch(0))
        link.receive()
        link.leave("")
        assert 4 <= fake.calls[0].heartbeats <= 12


def test_a_client_that_has_nothing_to_send_yet_sends_heartbeats_from_the_start() -> None:
    heard = threading.Event()

    def waits(call: Call) -> Iterator[Response]:
        yield opened(heartbeat_seconds=0.2)
        pool = ThreadPoolExecutor(1)
        rest = pool.submit(call.until_leave)
        time.sleep(1.5)
        if call.heartbeats:
            heard.set()
        rest.result(SECONDS)
        pool.shutdown()

    with linked(waits) as (_, link):
        assert heard.wait(3)
        link.leave("")
