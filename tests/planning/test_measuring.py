"""The RPCs by which a plan measures: what comes of them, their bounds, what they leave alone."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
import torch

from lesft.adapters import lora_parameters
from lesft.cohort_batch import Part
from lesft.errors import Busy, HandshakeMismatch, InvalidInput, TooLarge
from lesft.link_probe import MAX_PIECE_BYTES, MAX_PROBE_BYTES
from lesft.micro_batch import StepKey
from lesft.spec import PROTOCOL_VERSION
from lesft.v1 import model_pb2, model_pb2_grpc
from lesft_client.planning.link_speed import measure_link
from lesft_server.back_speed import BackSpeed, Lengths, measure_back
from lesft_server.link_echo import echo
from lesft_server.planning import Planning
from lesft_server.session import Engine
from lesft_testbed.emulated_link import EmulatedLink, LinkShape
from tests.harness import (
    RunningServer,
    make_front,
    random_samples,
    running_server,
    server_settings,
)
from tests.server.harness import assert_serving, raw_channel, refusal, refusal_of

REQUEST: dict[str, Any] = {
    "protocol_version": PROTOCOL_VERSION,
    "base_lengths": [9],
    "reference_lengths": [12],
    "target_lengths": [4],
}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(server_settings(model, tmp_path_factory.mktemp("state"))) as running:
        yield running


@pytest.fixture
def stub(server: RunningServer) -> Iterator[model_pb2_grpc.ModelServiceStub]:
    with raw_channel(server.grpc) as channel:
        yield model_pb2_grpc.ModelServiceStub(channel)


# ---------------------------------------------------------------------- the link


def test_a_link_is_found_to_be_what_it_is(server: RunningServer) -> None:
    shape = LinkShape(round_trip_ms=30, up_mbit=16, down_mbit=48)
    link = EmulatedLink(server.grpc, shape)
    try:
        with raw_channel(link.address) as channel:
            found = measure_link(channel, "server", aim_seconds=0.4)
    finally:
        link.close()
    assert found.round_trip_seconds == pytest.approx(0.03, abs=0.02)
    assert found.up_bytes_per_second == pytest.approx(2e6, rel=0.2)
    assert found.down_bytes_per_second == pytest.approx(6e6, rel=0.2)


def test_each_request_is_answered_with_the_bytes_that_it_asks_for(
    stub: model_pb2_grpc.ModelServiceStub,
) -> None:
    sizes = [0, 1, MAX_PIECE_BYTES, 100_000]
    requests = [model_pb2.MeasureLinkRequest(answer_bytes=size) for size in sizes]
    payloads = [answer.payload for answer in stub.MeasureLink(iter(requests))]
    assert [len(payload) for payload in payloads] == sizes
    assert len(set(payloads[2])) == 256


def test_pieces_over_the_limit_are_refused(
    server: RunningServer, stub: model_pb2_grpc.ModelServiceStub
) -> None:
    large = MAX_PIECE_BYTES + 1
    for request in (
        model_pb2.MeasureLinkRequest(answer_bytes=large),
        model_pb2.MeasureLinkRequest(answer_bytes=2**32 - 1),
        model_pb2.MeasureLinkRequest(payload=bytes(large)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.MeasureLink(iter([request])))
        largest = max(len(request.payload), request.answer_bytes)
        assert refusal_of(caught.value) == refusal(
            InvalidInput,
            f"payload and answer_bytes must be at most {MAX_PIECE_BYTES} bytes, got {largest}",
        )
    assert_serving(server)


async def answers_until_refused(
    requests: AsyncIterator[model_pb2.MeasureLinkRequest], seconds: float = 60
) -> tuple[int, str]:
    """How many requests are answered before the measurement is ended, and with what message."""
    count = 0
    answers = echo(requests, seconds)
    while True:
        try:
            await anext(answers)
        except TooLarge as error:
            return count, str(error)
        count += 1


def test_a_measurement_ends_at_its_bytes_whatever_its_messages_are_like() -> None:
    async def forever(
        request: model_pb2.MeasureLinkRequest,
    ) -> AsyncIterator[model_pb2.MeasureLinkRequest]:
        while True:
            yield request

    large = model_pb2.MeasureLinkRequest(answer_bytes=MAX_PIECE_BYTES, payload=bytes(1 << 20))
    for request, most in (
        (large, MAX_PROBE_BYTES // (2 << 20)),
        (model_pb2.MeasureLinkRequest(), MAX_PROBE_BYTES // (1 << 14)),
    ):
        count, message = asyncio.run(answers_until_refused(forever(request)))
        assert count == most
        assert message.startswith(f"a measurement may move {MAX_PROBE_BYTES} bytes")


def test_a_measurement_ends_at_its_time_when_no_request_comes() -> None:
    async def silent() -> AsyncIterator[model_pb2.MeasureLinkRequest]:
        yield model_pb2.MeasureLinkRequest()
        await asyncio.sleep(60)

    count, message = asyncio.run(answers_until_refused(silent(), seconds=0.1))
    assert (count, message) == (1, "a measurement may last 0.1 s: begin another one")


# ---------------------------------------------------------------------- the back


def test_the_server_tells_what_a_micro_batch_costs(
    stub: model_pb2_grpc.ModelServiceStub,
) -> None:
    answer = stub.MeasureBack(model_pb2.MeasureBackRequest(**REQUEST))
    assert 1e-4 < answer.fixed_seconds + 3 * answer.layer_seconds < 10


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"protocol_version": 1}, HandshakeMismatch, "protocol_version: server"),
        ({"base_lengths": []}, InvalidInput, "base_lengths"),
        ({"base_lengths": [65]}, TooLarge, "max_length is 64"),
        ({"base_lengths": [2**32 - 1]}, TooLarge, "max_length is 64"),
        ({"base_lengths": [4]}, InvalidInput, "of its sequence's 4 tokens"),
        ({"reference_lengths": []}, InvalidInput, "reference_lengths"),
        ({"target_lengths": [4, 4]}, InvalidInput, "target_lengths must have 1 to 1"),
        ({"target_lengths": [0]}, InvalidInput, "target_lengths"),
    ],
)
def test_lengths_of_no_micro_batch_are_refused(
    stub: model_pb2_grpc.ModelServiceStub,
    server: RunningServer,
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.MeasureBack(model_pb2.MeasureBackRequest(**{**REQUEST, **changes}))
    refused = refusal_of(caught.value)
    assert refused.kind is kind
    assert message in refused.message
    assert_serving(server)


def test_measuring_takes_no_more_than_its_part_of_the_device(server: RunningServer) -> None:
    now = [100.0]

    class SlowDevice:
        async def run(self, job: Callable[[], BackSpeed]) -> BackSpeed:
            now[0] += 2.0
            return job()

    engine = server.server.engine
    assert engine is not None
    slow = SimpleNamespace(device=SlowDevice(), limits=engine.limits, back=engine.back)
    planning = Planning(cast(Engine, slow), 3, accept=None, clock=lambda: now[0])

    def measure() -> model_pb2.MeasureBackResponse:
        return asyncio.run(planning.measure_back(model_pb2.MeasureBackRequest(**REQUEST)))

    measure()  # from 100 to 102: another may begin at 110
    now[0] = 107.0
    with pytest.raises(Busy, match=r"ask again in 3 s$"):
        measure()
    now[0] = 110.0
    measure()


@pytest.mark.parametrize("train_front", [True, False])
def test_what_is_measured_has_adapters_whatever_was_written_before(
    train_front: bool, model: Path, tmp_path: Path
) -> None:
    """Without them, and where no gradient goes back to the cut, a step would have none at all."""
    options: dict[str, Any] = {"train_front": train_front, "aggregate": False}
    with running_server(server_settings(model, tmp_path, **options)) as server:
        back = server.engine.back
        for untuned in (False, True):
            back.set_mode(dropout=False, untuned=untuned)
            assert measure_back(back, Lengths((9,), (12,), (4,))).fixed_seconds > 0
            assert all(parameter.requires_grad for parameter in lora_parameters(back.model))


def test_measuring_in_the_midst_of_a_window_changes_nothing(model: Path, tmp_path: Path) -> None:
    """With dropout, whose masks and whose being there at all a measurement could spoil."""
    options: dict[str, Any] = {"lora": {"dropout": 0.3}, "accumulation": 2}

    def trained(state: Path, measured: bool) -> dict[str, torch.Tensor]:
        with running_server(server_settings(model, state, **options)) as server:
            back = server.engine.back
            front = make_front(model, server.spec, "client-0")
            for round_index in range(2):
                for micro in range(2):
                    key = StepKey(round_index, micro)
                    sent = front.forward(key, random_samples(2, seed=micro)).micro_batch
                    back.train_step(key, [Part("client-0", sent, 1.0)])
                    if measured:
                        speed = measure_back(back, Lengths((9, 8), (12, 9), (4, 3)))
                        assert speed.fixed_seconds + speed.layer_seconds > 0
            # What is scored or written has no dropout, before a measurement and after.
            held_out = front.held_out(random_samples(2))
            score = back.score(*held_out)
            measure_back(back, Lengths((9,), (12,), (4,)))
            assert back.score(*held_out) == score
            return {name: tensor.clone() for name, tensor in back.state().items()}

    plain, other = (trained(tmp_path / str(flag), flag) for flag in (False, True))
    assert any(bool(tensor.any()) for name, tensor in plain.items() if "lora_B" in name)
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)
