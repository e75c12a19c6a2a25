"""The bytes that submissions under way may hold together."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from lesft.bundle import CHUNK_BYTES
from lesft.errors import Busy, Unreachable
from lesft.intake import Intake
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.tensor_pb2 import Chunk
from lesft_aggregator.server import Aggregator
from tests.aggregator.harness import Caller, error_of, run_aggregator, settings_for

Addresses = Mapping[str, str]


def test_what_does_not_fit_waits_until_it_does() -> None:
    async def run() -> list[str]:
        intake, steps = Intake(10, "--max"), list[str]()

        async def hold(name: str, num_bytes: int, until: asyncio.Event) -> None:
            async with intake.room(num_bytes):
                steps.append(f"{name} in")
                await until.wait()
            steps.append(f"{name} out")

        a_may_go, rest_may_go = asyncio.Event(), asyncio.Event()
        a = asyncio.create_task(hold("a", 6, a_may_go))
        b = asyncio.create_task(hold("b", 4, rest_may_go))
        await asyncio.sleep(0)
        c = asyncio.create_task(hold("c", 5, rest_may_go))
        await asyncio.sleep(0.01)
        assert steps == ["a in", "b in"]
        a_may_go.set()
        await a
        await asyncio.sleep(0.01)
        rest_may_go.set()
        await asyncio.gather(b, c)
        return steps

    steps = asyncio.run(asyncio.wait_for(run(), timeout=5))
    assert steps[:4] == ["a in", "b in", "a out", "c in"]


def test_one_who_gives_up_gives_its_room_back() -> None:
    async def run() -> None:
        intake = Intake(10, "--max")

        async def hold() -> None:
            async with intake.room(10):
                await asyncio.sleep(60)

        holder, waiter = asyncio.create_task(hold()), asyncio.create_task(hold())
        await asyncio.sleep(0.01)
        waiter.cancel()
        holder.cancel()
        await asyncio.wait([holder, waiter])
        await asyncio.wait_for(intake.room(10).__aenter__(), timeout=5)

    asyncio.run(run())


def half_submission(client_id: str, num_bytes: int) -> Iterator[pb.SubmitRequest]:
    """A header, the first chunk, and then nothing."""
    header = pb.Submission(client_id=client_id, run_id="lesft", num_samples=1)
    header.bundle.total_bytes = num_bytes
    yield pb.SubmitRequest(submission=header)
    yield pb.SubmitRequest(chunk=Chunk(index=0, data=bytes(CHUNK_BYTES)))


def test_a_client_that_stalls_gives_its_room_to_the_others(tmp_path: Path) -> None:
    large = save({"x": np.ones((3 << 20) // 4, np.float32)})

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        stalled = caller.stub.Submit()
        for request in half_submission("a", len(large)):
            await stalled.write(request)
        # The room is 4 MiB: b's 3 MiB only fit when a's are gone.
        assert (await caller.submit("b", large)).received == 1
        error = await error_of(stalled)
        assert type(error) is Unreachable
        assert "nothing came for 0.3 s in mid-submission: submit again" in str(error)
        assert (await caller.submit("a", large)).received == 2

    run_aggregator(settings_for(tmp_path, max_submission_mib=4, stall_seconds=0.3), scenario)


def test_of_one_client_only_eight_submissions_wait_for_room(tmp_path: Path) -> None:
    """Each of those that wait costs memory: a flood of them is refused, and the room is kept."""
    large = save({"x": np.ones((3 << 20) // 4, np.float32)})

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        under_way = [caller.stub.Submit() for _ in range(8)]
        for call in under_way:
            for request in half_submission("a", len(large)):
                await call.write(request)
        await asyncio.sleep(0.2)
        error = await error_of(caller.submit("a", large))
        assert type(error) is Busy
        assert "8 submissions of client 'a' are under way already" in str(error)
        for call in under_way:
            call.cancel()
        await asyncio.sleep(0.2)
        assert (await caller.submit("a", large)).received == 1
        assert (await caller.submit("b", large)).received == 2

    run_aggregator(settings_for(tmp_path, max_submission_mib=4), scenario)


def test_submissions_that_together_exceed_the_room_are_taken_one_after_another(
    tmp_path: Path,
) -> None:
    large = save({"x": np.ones((3 << 20) // 4, np.float32)})

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await asyncio.gather(*(caller.submit(client_id, large) for client_id in "abcdef"))
        header, tensors = await caller.fetch(1)
        assert list(header.client_ids) == list("abcdef")
        assert np.array_equal(tensors["x"], np.ones((3 << 20) // 4, np.float32))

    run_aggregator(settings_for(tmp_path, clients=6, max_submission_mib=4), scenario)
