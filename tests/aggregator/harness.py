"""A real aggregator on a free port of 127.0.0.1, and a client that speaks to it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import load, save

from lesft.bundle import BundleReader, bundle_chunks, bundle_info
from lesft.errors import LesftError
from lesft.interceptors import error_from
from lesft.spec import PROTOCOL_VERSION
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.aggregation_pb2_grpc import AggregationServiceStub
from lesft.v1.tensor_pb2 import BundleInfo, Chunk
from lesft_aggregator.mean import FloatArray
from lesft_aggregator.server import Aggregator
from lesft_aggregator.settings import AggregatorSettings

SHAPES = {
    "model.layers.0.mlp.gate_proj.lora_A.weight": (2, 5),
    "model.layers.0.mlp.gate_proj.lora_B.weight": (7, 2),
}
NAME = "model.layers.0.mlp.gate_proj.lora_A.weight"


def make_tensors(seed: int) -> dict[str, FloatArray]:
    """Random tensors of a small adapter."""
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def make_adapter(seed: int) -> bytes:
    """The same as safetensors bytes."""
    return save(make_tensors(seed))


class Caller:
    """One client's view of the aggregator."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: Any = AggregationServiceStub(channel)

    async def join(self, client_id: str = "a", **changes: Any) -> Any:
        fields: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "run_id": "lesft",
            "num_samples": 10,
        }
        request = pb.JoinRequest(client_id=client_id, **(fields | changes))
        return await self.stub.Join(request)

    async def submit(
        self,
        client_id: str = "a",
        data: bytes | None = None,
        bundle: BundleInfo | None = None,
        chunks: Sequence[Chunk] | None = None,
        **changes: Any,
    ) -> Any:
        """Submits an adapter; `bundle` and `chunks` replace what belongs to `data`."""
        data = make_adapter(0) if data is None else data
        fields: dict[str, Any] = {"run_id": "lesft", "base_version": 0, "num_samples": 10}
        header = pb.Submission(
            client_id=client_id, bundle=bundle or bundle_info(data), **(fields | changes)
        )
        pieces = list(bundle_chunks(data)) if chunks is None else chunks

        def requests() -> Iterator[pb.SubmitRequest]:
            yield pb.SubmitRequest(submission=header)
            for piece in pieces:
                yield pb.SubmitRequest(chunk=piece)

        return await self.stub.Submit(requests())

    async def fetch(
        self, version: int, client_id: str = "a", **changes: Any
    ) -> tuple[pb.Aggregate, dict[str, FloatArray]]:
        """Waits for a version that travels whole; returns its header and its tensors."""
        header, data = await self.fetch_bundle(version, client_id, **changes)
        return header, load(data)

    async def fetch_bundle(
        self, version: int, client_id: str = "a", **changes: Any
    ) -> tuple[pb.Aggregate, bytes]:
        """Waits for a version; returns its header and its bundle."""
        fields = {"run_id": "lesft"} | changes
        request = pb.FetchRequest(client_id=client_id, version=version, **fields)
        header, reader = pb.Aggregate(), None
        async for response in self.stub.Fetch(request):
            if response.WhichOneof("message") == "aggregate":
                header = response.aggregate
                reader = BundleReader(header.bundle, max_bytes=1 << 30)
            else:
                assert reader is not None
                reader.add(response.chunk)
        assert reader is not None
        return header, reader.data()


async def error_of(call: Awaitable[Any]) -> LesftError:
    """The error of our tree that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from(caught.value, "aggregator")


async def wait_until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds; the harness limits how long that may take."""
    while not condition():  # noqa: ASYNC110 (what is waited for has no event)
        await asyncio.sleep(0.01)


def settings_for(state: Path, **changes: Any) -> AggregatorSettings:
    """Settings with free ports and two clients."""
    values: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "control": "127.0.0.1:0",
        "clients": 2,
        "state": state,
    }
    return AggregatorSettings(**(values | changes))


Scenario = Callable[[Aggregator, Caller, Mapping[str, str]], Awaitable[None]]


def run_aggregator(settings: AggregatorSettings, scenario: Scenario) -> None:
    """Runs a scenario against an aggregator: `scenario(aggregator, caller, addresses)`."""

    async def run() -> None:
        aggregator = Aggregator(settings)
        try:
            addresses = await aggregator.start()
            async with grpc.aio.insecure_channel(addresses["grpc"]) as channel:
                await scenario(aggregator, Caller(channel), addresses)
        finally:
            await aggregator.stop("the aggregator is stopping")

    asyncio.run(asyncio.wait_for(run(), timeout=30))
