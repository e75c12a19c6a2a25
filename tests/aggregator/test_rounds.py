"""Rounds over real gRPC: who may join and submit, what is averaged, who waits."""

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load
from sqlalchemy.exc import OperationalError

from lesft.bundle import CHUNK_BYTES
from lesft.errors import (
    HandshakeMismatch,
    InternalError,
    InvalidInput,
    LesftError,
    NotFound,
    OutOfOrder,
    StaleVersion,
    Unreachable,
)
from lesft.spec import PROTOCOL_VERSION
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.tensor_pb2 import Chunk
from lesft_aggregator import rounds as rounds_module
from lesft_aggregator import store as store_module
from lesft_aggregator.mean import weighted_mean
from lesft_aggregator.rounds import MOVES, Round, RoundState
from lesft_aggregator.server import Aggregator
from lesft_aggregator.store import Store
from tests.aggregator.harness import (
    NAME,
    Caller,
    error_of,
    make_adapter,
    make_tensors,
    run_aggregator,
    settings_for,
    wait_until,
)

Addresses = Mapping[str, str]


def test_a_round_of_two_clients_publishes_their_weighted_mean(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        joined = await caller.join("a")
        assert (joined.version, joined.clients) == (0, 2)
        await caller.join("b")
        first = await caller.submit("b", make_adapter(2), num_samples=30)
        assert (first.version, first.received) == (1, 1)
        waiting = asyncio.create_task(caller.fetch(1, "b"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        second = await caller.submit("a", make_adapter(1), num_samples=10)
        assert (second.version, second.received) == (1, 2)
        header, tensors = await waiting
        assert (header.version, header.num_samples) == (1, 40)
        assert list(header.client_ids) == ["a", "b"]
        one, two = make_tensors(1), make_tensors(2)
        assert tensors.keys() == one.keys()
        for name, values in tensors.items():
            dense = np.average([one[name], two[name]], axis=0, weights=[10.0, 30.0])
            assert np.array_equal(values, dense.astype(np.float32))
        assert (await caller.join("a")).version == 1

    run_aggregator(settings_for(tmp_path), scenario)


def test_rounds_follow_one_another_and_old_versions_stay_available(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        for version in range(3):
            data = make_adapter(version)
            answer = await caller.submit("a", data, base_version=version, num_samples=version + 1)
            assert (answer.version, answer.received) == (version + 1, 1)
            header, _ = await caller.fetch(version + 1)
            # A data set may grow or shrink between rounds: what was said last counts.
            assert (header.version, header.num_samples) == (version + 1, version + 1)
        _, tensors = await caller.fetch(1)
        assert np.array_equal(tensors[NAME], make_tensors(0)[NAME])

    run_aggregator(settings_for(tmp_path, clients=1), scenario)


HANDSHAKES: list[tuple[dict[str, Any], type[LesftError], str]] = [
    ({"run_id": "other"}, HandshakeMismatch, "run_id: aggregator 'lesft', client 'other'"),
    (
        {"protocol_version": 99},
        HandshakeMismatch,
        f"protocol_version: aggregator {PROTOCOL_VERSION}, client 99",
    ),
    ({"client_id": ""}, InvalidInput, "client_id must be 1 to 64 of letters, digits"),
    ({"client_id": "a/../b"}, InvalidInput, "got 'a/../b'"),
    ({"client_id": "x" * 65}, InvalidInput, "client_id must be 1 to 64 of letters, digits"),
    ({"num_samples": 0}, InvalidInput, "num_samples must lie between 1 and"),
    ({"num_samples": 2**64 - 1}, InvalidInput, "got 18446744073709551615"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), HANDSHAKES)
def test_a_client_of_another_run_or_with_bad_values_cannot_join(
    changes: dict[str, Any], kind: type[LesftError], message: str, tmp_path: Path
) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        error = await error_of(caller.join(**changes))
        assert type(error) is kind
        assert message in str(error)
        if "protocol_version" not in changes:
            error = await error_of(caller.submit(**changes))
            assert type(error) is kind
            assert message in str(error)

    run_aggregator(settings_for(tmp_path), scenario)


def test_a_client_whose_run_has_other_settings_than_the_first_ones_cannot_join(
    tmp_path: Path,
) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.join("a", run_fingerprint="sha256:1111")
        error = await error_of(caller.join("b", run_fingerprint="sha256:2222"))
        assert type(error) is HandshakeMismatch
        said = "run_fingerprint: aggregator sha256:1111, client 'sha256:2222': clients"
        assert said in str(error)
        error = await error_of(caller.join("b", run_fingerprint=""))
        assert type(error) is HandshakeMismatch
        for name in ("a", "b"):
            assert (await caller.join(name, run_fingerprint="sha256:1111")).version == 0

    run_aggregator(settings_for(tmp_path), scenario)


def test_one_client_too_many_is_told_who_is_in(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.join("a")
        await caller.submit("b")
        await caller.join("a")
        for call in (caller.join("c"), caller.submit("c")):
            error = await error_of(call)
            assert type(error) is HandshakeMismatch
            assert "clients: aggregator 2 (a, b), 'c' is one more" in str(error)

    run_aggregator(settings_for(tmp_path), scenario)


def test_a_submission_for_a_closed_version_is_told_the_current_one(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.submit("a", base_version=0)
        await caller.fetch(1)
        await caller.submit("a", base_version=1)
        await caller.fetch(2)
        error = await error_of(caller.submit("a", make_adapter(5), base_version=3))
        assert type(error) is OutOfOrder
        assert "base_version 3 is not published yet: the current version is 2" in str(error)

    run_aggregator(settings_for(tmp_path, clients=1), scenario)


def test_a_client_that_comes_after_its_round_closed_is_stale(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.submit("a")
        await caller.fetch(1)
        error = await error_of(caller.submit("b"))
        assert type(error) is StaleVersion
        assert "base_version 0 is closed: the current version is 1" in str(error)

    run_aggregator(settings_for(tmp_path, quorum=1, deadline_seconds=0.05), scenario)


def test_the_same_submission_again_is_answered_again_and_counted_once(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        for _ in range(3):
            answer = await caller.submit("a", make_adapter(1), num_samples=10)
            assert (answer.version, answer.received) == (1, 1)
        await caller.submit("b", make_adapter(2), num_samples=30)
        header, tensors = await caller.fetch(1)
        assert header.num_samples == 40
        # Also when the round has been published and the submission's file is gone.
        answer = await caller.submit("a", make_adapter(1), num_samples=10)
        assert (answer.version, answer.received) == (1, 2)
        _, again = await caller.fetch(1)
        assert np.array_equal(tensors[NAME], again[NAME])

    run_aggregator(settings_for(tmp_path), scenario)


def test_the_same_submission_twice_at_once_is_counted_once(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        answers = await asyncio.gather(*(caller.submit("a") for _ in range(5)))
        assert [answer.received for answer in answers] == [1] * 5

    run_aggregator(settings_for(tmp_path), scenario)


@pytest.mark.parametrize("changes", [{"data": make_adapter(2)}, {"num_samples": 11}])
def test_a_fork_is_refused_and_the_first_submission_stays(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.submit("a", make_adapter(1))
        error = await error_of(caller.submit("a", **({"data": make_adapter(1)} | changes)))
        assert type(error) is OutOfOrder
        assert "client 'a' submitted another adapter for base_version 0" in str(error)
        await caller.submit("b", make_adapter(1))
        header, tensors = await caller.fetch(1)
        assert header.num_samples == 20
        assert np.array_equal(tensors[NAME], make_tensors(1)[NAME])

    run_aggregator(settings_for(tmp_path), scenario)


def test_at_the_deadline_a_quorum_is_averaged_without_the_rest(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.submit("b", make_adapter(2))
        await caller.submit("c", make_adapter(3))
        header, _ = await caller.fetch(1)
        assert list(header.client_ids) == ["b", "c"]

    settings = settings_for(tmp_path, clients=3, quorum=2, deadline_seconds=0.2)
    run_aggregator(settings, scenario)


def test_a_quorum_before_the_deadline_waits_for_the_rest(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        for client_id in "abc":
            await asyncio.sleep(0.05)
            await caller.submit(client_id)
        header, _ = await caller.fetch(1)
        assert list(header.client_ids) == ["a", "b", "c"]

    settings = settings_for(tmp_path, clients=3, quorum=1, deadline_seconds=20)
    run_aggregator(settings, scenario)


def test_a_deadline_without_quorum_is_said_and_the_round_closes_once_it_is_reached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.join("b")
        with caplog.at_level(logging.WARNING, "lesft_aggregator"):
            await caller.submit("a")
            await wait_until(lambda: caplog.messages)
        assert caplog.messages == [
            "version 1: deadline of 0.1 s passed with 1 of 3 clients, 2 are needed: waiting on; "
            "missing: b"
        ]
        assert aggregator.rounds.current.state is RoundState.OPEN
        await caller.submit("b")
        header, _ = await caller.fetch(1)
        assert list(header.client_ids) == ["a", "b"]

    settings = settings_for(tmp_path, clients=3, quorum=2, deadline_seconds=0.1)
    run_aggregator(settings, scenario)


def test_while_a_round_is_averaged_it_takes_no_more_and_the_service_still_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_is_free = asyncio.Event()

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        loop = asyncio.get_running_loop()

        def slow(parts: Any) -> Any:
            # Ends only when the event loop goes on while the mean is computed.
            asyncio.run_coroutine_threadsafe(loop_is_free.wait(), loop).result(timeout=20)
            return weighted_mean(parts)

        monkeypatch.setattr(rounds_module, "weighted_mean", slow)
        await caller.submit("a", make_adapter(1))
        await wait_until(lambda: aggregator.rounds.current.state is RoundState.AVERAGING)
        error = await error_of(caller.submit("b"))
        assert type(error) is StaleVersion
        assert "is being averaged without 'b'; fetch version 1" in str(error)
        assert (await caller.submit("a", make_adapter(1))).received == 1
        loop_is_free.set()
        header, _ = await caller.fetch(1)
        assert list(header.client_ids) == ["a"]

    run_aggregator(settings_for(tmp_path, quorum=1, deadline_seconds=0.05), scenario)


def test_fetch_refuses_versions_that_never_come_soon(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        error = await error_of(caller.fetch(2))
        assert type(error) is NotFound
        assert "version 2 is not in sight: the current version is 0" in str(error)
        error = await error_of(caller.fetch(0))
        assert type(error) is InvalidInput
        assert "version must be at least 1, got 0" in str(error)
        error = await error_of(caller.fetch(1, run_id="other"))
        assert type(error) is HandshakeMismatch

    run_aggregator(settings_for(tmp_path), scenario)


def test_who_waits_gets_heartbeats_that_say_what_for_and_then_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged = threading.Event()

    def slow(parts: Any) -> Any:
        assert averaged.wait(20)
        return weighted_mean(parts)

    monkeypatch.setattr(rounds_module, "weighted_mean", slow)

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        joined = await caller.join("a")
        assert joined.heartbeat_seconds == 0.1
        for client_id in "bc":
            await caller.join(client_id)
        await caller.submit("a")
        start = time.monotonic()
        call = caller.stub.Fetch(pb.FetchRequest(client_id="a", run_id="lesft", version=1))

        async def next_wait() -> str:
            response = await call.read()
            assert response.WhichOneof("message") == "heartbeat"
            return str(response.heartbeat.waiting_for)

        assert [await next_wait() for _ in range(3)] == 3 * ["the adapters of b, c"]
        assert 0.3 <= time.monotonic() - start < 2
        await caller.submit("c")
        await next_wait()  # this one may have been on its way
        assert await next_wait() == "the adapters of b"
        await caller.submit("b")
        await next_wait()
        assert await next_wait() == "the averaging"
        averaged.set()
        while (response := await call.read()).WhichOneof("message") == "heartbeat":
            assert response.heartbeat.waiting_for == "the averaging"
        assert response.aggregate.version == 1
        assert (await call.read()).WhichOneof("message") == "chunk"

    run_aggregator(settings_for(tmp_path, clients=3, heartbeat_seconds=0.1), scenario)


def test_who_comes_when_the_version_is_there_gets_no_heartbeat(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.submit("a")
        await caller.fetch(1)
        call = caller.stub.Fetch(pb.FetchRequest(client_id="a", run_id="lesft", version=1))
        assert (await call.read()).WhichOneof("message") == "aggregate"

    run_aggregator(settings_for(tmp_path, clients=1, heartbeat_seconds=0.1), scenario)


def test_a_waiting_client_may_give_up_and_the_round_goes_on(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        waiting = asyncio.create_task(caller.fetch(1))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await caller.submit("a")
        await caller.submit("b")
        header, _ = await caller.fetch(1)
        assert list(header.client_ids) == ["a", "b"]

    run_aggregator(settings_for(tmp_path), scenario)


def test_a_client_that_vanishes_in_mid_submission_leaves_nothing_behind(tmp_path: Path) -> None:
    header = pb.Submission(client_id="a", run_id="lesft", num_samples=1)
    header.bundle.total_bytes = 3 << 20

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        call = caller.stub.Submit()
        await call.write(pb.SubmitRequest(submission=header))
        await call.write(pb.SubmitRequest(chunk=Chunk(index=0, data=bytes(CHUNK_BYTES))))
        await asyncio.sleep(0.05)
        call.cancel()
        answer = await caller.submit("a", make_adapter(1))
        assert answer.received == 1
        assert [path.name for path in (tmp_path / "submissions").iterdir()] == [
            "00000-a.safetensors"
        ]

    run_aggregator(settings_for(tmp_path), scenario)


def test_stopping_tells_those_who_wait(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        waiting = asyncio.create_task(error_of(caller.fetch(1)))
        await asyncio.sleep(0.05)
        await aggregator.rounds.stop("the aggregator is stopping")
        error = await waiting
        assert type(error) is Unreachable  # so the clients try again until it is back
        assert str(error) == "aggregator: the aggregator is stopping"
        assert type(await error_of(caller.submit("a"))) is Unreachable

    run_aggregator(settings_for(tmp_path), scenario)


def test_a_failed_averaging_ends_the_run_loudly_and_the_next_start_averages_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(parts: Any) -> Any:
        raise OSError("no space left on device")

    async def fails(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.submit("a", make_adapter(1))
        error = await error_of(caller.fetch(1))
        assert type(error) is InternalError
        assert "averaging version 1 failed; the aggregator's log has the details" in str(error)
        await aggregator.rounds.wait_until_ended()

    async def recovers(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        _, tensors = await caller.fetch(1)
        assert np.array_equal(tensors[NAME], load(make_adapter(1))[NAME])

    settings = settings_for(tmp_path, clients=1)
    with monkeypatch.context() as patch:
        patch.setattr(rounds_module, "weighted_mean", broken)
        run_aggregator(settings, fails)
    run_aggregator(settings, recovers)


@pytest.mark.parametrize("call", ["weighted_mean", "read_layout"])
def test_a_full_disk_holds_everybody_up_until_there_is_room(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call is in averaging, the other in keeping a submission."""
    works, full = getattr(rounds_module, call), [True]

    def write(*arguments: Any) -> Any:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return works(*arguments)

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        submitting = asyncio.create_task(caller.submit("a", make_adapter(1)))
        fetching = asyncio.create_task(caller.fetch(1))
        await wait_until(lambda: aggregator.rounds.obstacle)
        message = f"no room on disk for {tmp_path}: free some, training goes on by itself"
        assert aggregator.rounds.obstacle == message
        async with httpx.AsyncClient(trust_env=False) as http:
            ready = await http.get(f"http://{addresses['control']}/readyz")
        assert (ready.status_code, ready.text) == (503, f"{message}\n")
        assert aggregator.rounds.version == 0
        full.clear()
        await submitting
        _, tensors = await fetching
        assert np.array_equal(tensors[NAME], load(make_adapter(1))[NAME])
        assert aggregator.rounds.obstacle == ""

    monkeypatch.setattr(rounds_module, call, write)
    run_aggregator(settings_for(tmp_path, clients=1), scenario)


def test_who_tries_again_and_again_while_the_disk_is_full_piles_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a client does that hears nothing for its --stall-seconds."""
    works, full = Store.add_submission, [True]

    def write(*arguments: Any, **more: Any) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        works(*arguments, **more)

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.join("a")
        for _ in range(4):
            trying = asyncio.create_task(caller.submit("a", make_adapter(1)))
            await wait_until(lambda: aggregator.rounds.obstacle)
            await asyncio.sleep(0.05)
            trying.cancel()
            await asyncio.wait([trying])
        assert len(aggregator.rounds._tasks) == 1  # the first one's, which has begun
        full.clear()
        assert (await caller.submit("a", make_adapter(1))).received == 1
        await caller.fetch(1)

    monkeypatch.setattr(Store, "add_submission", write)
    run_aggregator(settings_for(tmp_path, clients=1), scenario)


def test_a_client_can_join_once_the_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works, full = store_module._remember, [True]

    def remember(*arguments: Any) -> None:
        if full:
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        works(*arguments)

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        joining = asyncio.create_task(caller.join("a"))
        await wait_until(lambda: aggregator.rounds.obstacle)
        assert not joining.done()
        full.clear()
        assert (await joining).version == 0

    monkeypatch.setattr(store_module, "_remember", remember)
    run_aggregator(settings_for(tmp_path, clients=1), scenario)


def test_fresh_drops_what_an_earlier_run_left(tmp_path: Path) -> None:
    async def first(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.submit("a", make_adapter(1))
        await caller.fetch(1)

    async def anew(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        assert aggregator.rounds.version == 0
        await caller.submit("b", make_adapter(2))
        _, tensors = await caller.fetch(1)
        assert np.array_equal(tensors[NAME], load(make_adapter(2))[NAME])

    run_aggregator(settings_for(tmp_path, clients=1), first)
    run_aggregator(settings_for(tmp_path, clients=1, fresh=True), anew)


def test_a_round_only_moves_along_its_table() -> None:
    legal = {(here, there) for here, targets in MOVES.items() for there in targets}
    assert legal == {
        (RoundState.OPEN, RoundState.AVERAGING),
        (RoundState.AVERAGING, RoundState.PUBLISHED),
    }
    one = Round(base_version=0)
    with pytest.raises(AssertionError, match="cannot go from"):
        one.move(RoundState.PUBLISHED)
