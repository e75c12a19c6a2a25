"""Limits: what one client may take of a service, and how absurd its numbers may be."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from lesft.call_limits import CallLimiter
from lesft.errors import AlreadyJoined, Busy, InvalidInput, TooLarge
from lesft.intake import Intake
from lesft.limit_settings import CallLimits
from lesft.micro_batch import Path as Activations
from lesft.micro_batch import StepKey
from lesft.norms import ActivationNorms
from lesft.refusals import Refusals
from lesft.v1.model_pb2 import FetchFrontRequest
from lesft.v1.training_pb2 import TrainRequest
from lesft_aggregator.norms import AdapterNorms
from lesft_aggregator.server import Aggregator
from lesft_server.pauses import Pauses
from tests.aggregator.harness import Caller, error_of, make_tensors, run_aggregator, settings_for
from tests.harness import save_tiny_model
from tests.server.harness import (
    RawSession,
    Refusal,
    heartbeat,
    join,
    make_batch,
    opening,
    raw_channel,
    step_messages,
    wait_until,
)
from tests.server.mid_run import serving, step_all


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


# ---------------------------------------------------------------------- calls


def limiter(**limits: float) -> tuple[CallLimiter, Refusals, list[float]]:
    """A limiter whose clock is the last number of the list."""
    refusals, clock = Refusals(), [0.0]
    settings = CallLimits.model_validate(limits)
    return CallLimiter(settings, refusals, clock=lambda: clock[-1]), refusals, clock


def test_one_client_may_have_so_many_calls_and_the_others_theirs() -> None:
    calls, refusals, _ = limiter(max_calls_per_client=2)
    with calls.admit("a"), calls.admit("a"):
        with pytest.raises(Busy, match="2 calls of yours is all"), calls.admit("a"):
            pass
        with calls.admit("b"):
            assert calls.under_way == 3
    with calls.admit("a"):
        assert calls.under_way == 1
    assert refusals.counts == {"calls of one client": 1}


def test_all_clients_together_may_have_so_many_calls() -> None:
    calls, refusals, _ = limiter(max_calls=2)
    with (
        calls.admit("a"),
        calls.admit("b"),
        pytest.raises(Busy, match="2 calls of all clients"),
        calls.admit("c"),
    ):
        pass
    assert calls.under_way == 0
    assert refusals.counts == {"calls of all clients": 1}


def test_calls_that_begin_too_fast_are_refused_until_time_has_passed() -> None:
    calls, refusals, clock = limiter(calls_per_second=2)

    def begin(name: str) -> bool:
        try:
            with calls.admit(name):
                return True
        except Busy:
            return False

    assert [begin("a") for _ in range(10)] == [True] * 8 + [False] * 2
    assert begin("b")
    clock.append(1.0)
    assert [begin("a") for _ in range(3)] == [True, True, False]
    clock.append(100.0)
    assert [begin("a") for _ in range(9)] == [True] * 8 + [False]
    assert refusals.counts == {"calls per second": 4}


@pytest.mark.parametrize("method", ["ModelService/DescribeRun", "TrainingService/Train"])
def test_a_server_refuses_calls_over_the_limit_and_serves_other_connections(
    method: str, model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path, calls_per_second=0.5) as server:

        def statuses(channel: grpc.Channel) -> list[str]:
            call = channel.stream_stream(f"/lesft.v1.{method}")
            codes = []
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as caught:
                    list(call(iter([b""]), timeout=10))
                codes.append(caught.value.code().name)
            return codes

        allowed = "FAILED_PRECONDITION"
        with raw_channel(server.grpc) as one, raw_channel(server.grpc) as other:
            assert statuses(one) == [allowed, allowed, "RESOURCE_EXHAUSTED"]
            assert statuses(other) == [allowed, allowed, "RESOURCE_EXHAUSTED"]
        metrics = httpx.get(f"http://{server.control}/metrics").text
        assert 'limit_hits_total{reason="calls per second"} 2.0' in metrics


def test_calls_whose_answers_nobody_reads_take_their_clients_room_and_nobody_elses(
    model: Path, tmp_path: Path
) -> None:
    """The front is larger than what gRPC takes of an answer that is not read."""
    large = save_tiny_model(tmp_path / "large", vocab_size=300_000)
    with (
        serving(large, tmp_path / "state", max_calls_per_client=2) as server,
        raw_channel(server.grpc, ("grpc.http2.bdp_probe", 0)) as unread,
        raw_channel(server.grpc) as other,
    ):
        request = FetchFrontRequest(front_fingerprint=server.spec.front_fingerprint)

        def fetch(channel: grpc.Channel) -> Any:
            call = channel.unary_stream("/lesft.v1.ModelService/FetchFront")
            return call(request.SerializeToString(), timeout=30)

        calls = [fetch(unread) for _ in range(2)]
        for call in calls:
            assert len(next(call)) > 0
        with pytest.raises(grpc.RpcError) as caught:
            next(fetch(unread))
        assert caught.value.details() == (
            "2 calls of yours is all that this service takes: try again in a while"
        )
        assert sum(1 for _ in fetch(other)) > 30
        for call in calls:
            call.cancel()
        limiter = server.server._limiter
        wait_until(lambda: limiter.under_way == 0)
        assert len(next(fetch(unread))) > 0


def test_a_compressed_message_counts_as_large_as_it_is(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path) as server,
        raw_channel(server.grpc, ("grpc.default_compression_algorithm", 2)) as channel,
    ):
        bomb = RawSession(channel)
        message = TrainRequest()
        message.chunk.data = bytes(30 << 20)
        bomb.send(message)
        told = bomb.refusal()
        assert told.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert told.message == "Decompressed message larger than max"


# ---------------------------------------------------------------------- room


def test_who_waits_longest_for_room_gets_it_first_and_who_gives_up_holds_none() -> None:
    async def run() -> tuple[list[str], int]:
        intake, entered = Intake(10, "--max-receiving-mib"), list[str]()

        async def hold(name: str, num_bytes: int) -> None:
            async with intake.room(num_bytes):
                entered.append(name)
                await asyncio.sleep(0.05)

        tasks = [asyncio.create_task(hold(*pair)) for pair in (("a", 6), ("b", 9), ("c", 1))]
        await asyncio.sleep(0.01)
        assert (entered, intake.num_waiting, intake.used_bytes) == (["a"], 2, 6)
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        assert entered == ["a", "c"]
        await asyncio.gather(*tasks, return_exceptions=True)
        return entered, intake.used_bytes

    assert asyncio.run(run()) == (["a", "c"], 0)


def test_a_bundle_that_never_has_room_is_refused_by_the_option(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path, clients=1, max_receiving_mib=1) as server,
        raw_channel(server.grpc) as channel,
    ):
        session = join(channel, server.spec, "a")
        key = StepKey(0, 0)
        session.send(*step_messages(make_batch(key, (4000, 4000), (4000, 4000), (1, 1)))[:1])
        told = session.refusal()
        assert (told.code, told.kind) == (grpc.StatusCode.RESOURCE_EXHAUSTED, TooLarge)
        assert "raise --max-receiving-mib" in told.message
        assert server.engine.intake.used_bytes == 0


def test_room_comes_back_when_a_client_goes_in_the_midst_of_a_bundle(
    model: Path, tmp_path: Path
) -> None:
    with (
        serving(model, tmp_path, clients=1) as server,
        raw_channel(server.grpc) as channel,
    ):
        session = join(channel, server.spec, "a")
        session.send(step_messages(make_batch(StepKey(0, 0)))[0])
        wait_until(lambda: server.engine.intake.used_bytes > 0)
        session.call.cancel()
        wait_until(lambda: server.engine.intake.used_bytes == 0)


# ---------------------------------------------------------------------- norms


def test_activations_within_the_norm_pass_as_they_are() -> None:
    refusals = Refusals()
    hidden_ND = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    for norms in (
        ActivationNorms(0, "refuse", refusals),
        ActivationNorms(5.0, "refuse", refusals),
        ActivationNorms(5.0, "clip", refusals),
    ):
        assert norms.admit("base", hidden_ND) is hidden_ND
    assert refusals.counts == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_above_the_norm_are_cut_down_row_by_row_or_refused(dtype: torch.dtype) -> None:
    refusals = Refusals()
    hidden_ND = torch.tensor([[3e14, 4e14], [0.75, 0.0]], dtype=dtype)
    clipped_ND = ActivationNorms(5.0, "clip", refusals).admit("base", hidden_ND)
    assert clipped_ND.dtype is dtype
    assert torch.allclose(clipped_ND.float(), torch.tensor([[3.0, 4.0], [0.75, 0.0]]), rtol=1e-2)
    with pytest.raises(InvalidInput, match=r"hidden state of norm [0-9.]+e\+14, but at most 5 is"):
        ActivationNorms(5.0, "refuse", refusals).admit("base", hidden_ND)
    assert refusals.counts == {"activation norm clipped": 1, "activation norm refused": 1}


def absurd(key: StepKey) -> list[TrainRequest]:
    batch = make_batch(key)
    large = Activations(batch.base.activations_ND * 1e9, batch.base.lengths)
    return step_messages(replace(batch, base=large))


def test_a_server_refuses_absurd_norms_and_trains_on_with_the_others(
    model: Path, tmp_path: Path
) -> None:
    with (
        serving(model, tmp_path, max_activation_norm=100) as server,
        raw_channel(server.grpc) as channel,
    ):
        a, b = (join(channel, server.spec, name, instance_id=name) for name in "ab")
        b.send(*absurd(StepKey(0, 0)))
        told: Refusal = b.refusal()
        assert (told.code, told.kind) == (grpc.StatusCode.INVALID_ARGUMENT, InvalidInput)
        assert "(--max-activation-norm)" in told.message
        b = join(channel, server.spec, "b", StepKey(0, 0), instance_id="b")
        step_all([a, b], StepKey(0, 0))
        assert server.server._metrics.limits.counts == {"activation norm refused": 1}


def test_a_server_told_to_clip_trains_on_what_is_left(model: Path, tmp_path: Path) -> None:
    options = {"max_activation_norm": 100, "norm_policy": "clip", "clients": 1}
    with (
        serving(model, tmp_path, **options) as server,
        raw_channel(server.grpc) as channel,
    ):
        a = join(channel, server.spec, "a", instance_id="a")
        a.send(*absurd(StepKey(0, 0)))
        assert a.receive_step().loss < 20
        assert server.server._metrics.limits.counts == {"activation norm clipped": 1}


def adapters(scale: float) -> bytes:
    return save({name: tensor * np.float32(scale) for name, tensor in make_tensors(0).items()})


def norm_of(data: bytes) -> float:
    squares = [np.square(tensor, dtype=np.float64).sum() for tensor in load(data).values()]
    return float(np.sqrt(np.sum(squares)))


def test_an_adapter_above_the_norm_is_scaled_down_or_refused() -> None:
    refusals = Refusals()
    small, large = adapters(1), adapters(1e30)
    for norms in (AdapterNorms(0, "refuse", refusals), AdapterNorms(100, "refuse", refusals)):
        assert norms.admit(small) is small
    clipped = AdapterNorms(3, "clip", refusals).admit(large)
    assert norm_of(clipped) == pytest.approx(3, rel=1e-6)
    name = next(iter(load(small)))
    expected = load(small)[name] * 3 / norm_of(small)
    assert np.allclose(load(clipped)[name], expected, rtol=1e-5)
    with pytest.raises(InvalidInput, match="but at most 3 is taken"):
        AdapterNorms(3, "refuse", refusals).admit(large)
    assert refusals.counts == {"adapter norm clipped": 1, "adapter norm refused": 1}


def test_an_aggregator_refuses_an_absurd_adapter_and_takes_the_next(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: object) -> None:
        error = await error_of(caller.submit("a", adapters(1e9)))
        assert type(error) is InvalidInput
        assert "(--max-adapter-norm)" in str(error)
        assert (await caller.submit("a", adapters(1))).received == 1

    run_aggregator(settings_for(tmp_path, max_adapter_norm=100), scenario)


def test_an_aggregator_told_to_clip_averages_what_is_left_and_knows_a_repeat(
    tmp_path: Path,
) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: object) -> None:
        for _ in range(2):
            assert (await caller.submit("a", adapters(1e9))).received == 1
        assert (await caller.submit("b", adapters(1e9))).received == 2
        _, tensors = await caller.fetch(1)
        assert norm_of(save(tensors)) == pytest.approx(3, rel=1e-6)

    run_aggregator(settings_for(tmp_path, max_adapter_norm=3, norm_policy="clip"), scenario)


# ---------------------------------------------------------------------- members who never send

DEADLINE_SECONDS = 0.6


@pytest.fixture
def deadline_run(model: Path, tmp_path: Path) -> Iterator[tuple[grpc.Channel, object]]:
    options = {
        "mode": "deadline",
        "quorum": 1,
        "deadline_seconds": DEADLINE_SECONDS,
        "rounds": 20,
        "accumulation": 1,
        "aggregation_interval": 20,
    }
    with serving(model, tmp_path, **options) as server, raw_channel(server.grpc) as channel:
        yield channel, server.spec


def test_a_member_that_comes_again_and_again_and_sends_nothing_is_soon_not_waited_for(
    deadline_run: tuple[grpc.Channel, object],
) -> None:
    """Else each of its sessions would cost the others a deadline."""
    channel, spec = deadline_run
    a = join(channel, spec, "a", instance_id="a")  # type: ignore[arg-type]
    idle = join(channel, spec, "b", instance_id="b")  # type: ignore[arg-type]
    waited = []
    for round_index in range(6):
        start = time.monotonic()
        a.send(*step_messages(make_batch(StepKey(round_index, 0))))
        a.receive_step()
        waited.append(time.monotonic() - start > DEADLINE_SECONDS * 0.8)
        idle.call.cancel()
        idle = RawSession(channel)
        idle.send(opening(spec, "b", instance_id="b"), heartbeat())  # type: ignore[arg-type]
        assert idle.receive().WhichOneof("message") == "opened"
    assert waited == [True, True, True, False, False, False]


# ---------------------------------------------------------------------- members who come in vain


def test_pauses_grow_until_something_is_handed_in() -> None:
    pauses = Pauses()
    waited = []
    for _ in range(10):
        waited.append(pauses.seconds("a"))
        pauses.came_in_vain("a")
    assert waited == [0, 0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert pauses.seconds("b") == 0
    pauses.handed_in("a")
    assert pauses.seconds("a") == 0


def test_a_client_that_opens_session_after_session_waits_and_one_that_trains_does_not(
    model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        a, b = (join(channel, server.spec, name, instance_id=name) for name in "ab")
        step_all([a, b], StepKey(0, 0))
        begun = []
        for _ in range(5):
            start = time.monotonic()
            join(channel, server.spec, "b", StepKey(0, 1), instance_id="b").call.cancel()
            wait_until(lambda: not server.engine.run.members["b"].connected)
            begun.append(time.monotonic() - start)
        assert begun[4] > 0.2 > begun[0]
        assert server.server._metrics.limits.counts == {"sessions in vain": 2}
        b = join(channel, server.spec, "b", StepKey(0, 1), instance_id="b")
        step_all([a, b], StepKey(0, 1))
        assert server.engine.pauses.seconds("b") == 0


def test_sessions_that_are_refused_count_as_well(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        a = join(channel, server.spec, "a", instance_id="a")
        for _ in range(4):
            other = RawSession(channel)
            other.send(opening(server.spec, "a", instance_id="other"))
            assert other.refusal().kind is AlreadyJoined
        assert server.engine.pauses.seconds("a") == 0.2
        a.call.cancel()
