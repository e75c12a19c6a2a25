"""56 honest clients of a real server, alone and with 8 hostile ones: what a step takes them."""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from lesft.bundle import BundleReader
from lesft.micro_batch import StepKey
from lesft.spec import RunSpec
from lesft.v1.training_pb2 import TrainRequest, TrainResponse
from tests.harness import save_tiny_model
from tests.hostile.attackers import describe
from tests.processes.harness import ANY_PORT, Service
from tests.server.harness import make_batch, opening, step_messages

HONEST, ALL = 56, 64
STEPS, WARM_UP = 40, 10
REPEATS = 5

OPTIONS = {
    "clients": ALL,
    "quorum": HONEST,
    "mode": "deadline",
    "deadline-seconds": 1,
    "rounds": 10_000,
    "aggregation-interval": 10_000,
    "accumulation": 2,
    "cut-layer": 1,
    "max-length": 64,
    "threads": 1,
    "max-activation-norm": 1e6,
    "heartbeat-seconds": 1,
    "stall-seconds": 10,
}


class HonestClient:
    """A front of random numbers on a connection of its own; asynchronous."""

    def __init__(self, address: str, spec: RunSpec, name: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._spec = spec
        self._name = name
        self._outgoing: asyncio.Queue[TrainRequest] = asyncio.Queue()
        method: Any = self._channel.stream_stream(
            "/lesft.v1.TrainingService/Train",
            request_serializer=TrainRequest.SerializeToString,
            response_deserializer=TrainResponse.FromString,
        )
        self._call = method(self._requests())

    async def _requests(self) -> AsyncIterator[TrainRequest]:
        yield opening(self._spec, self._name, instance_id=self._name)
        while True:
            yield await self._outgoing.get()

    async def _next(self) -> TrainResponse:
        while (response := await self._call.read()).WhichOneof("message") == "heartbeat":
            pass
        return response  # type: ignore[no-any-return]

    async def open(self) -> None:
        """Join the run."""
        assert (await self._next()).WhichOneof("message") == "opened"

    async def step(self, key: StepKey) -> float:
        """One micro-batch and its gradient; how long that took."""
        start = time.monotonic()
        for message in step_messages(make_batch(key, (7,), (8,), (3,))):
            self._outgoing.put_nowait(message)
        header = (await self._next()).step
        assert (header.round, header.micro) == (key.round, key.micro)
        reader = BundleReader(header.bundle, 1 << 20)
        while not reader.complete:
            reader.add((await self._next()).chunk)
        return time.monotonic() - start

    async def close(self) -> None:
        """End the connection."""
        self._call.cancel()
        await self._channel.close()


@dataclass(frozen=True)
class Measured:
    """One server's steps."""

    step_seconds: list[float]
    """From the first part sent to the last answer read, step by step."""
    client_seconds: list[float]
    """The same of each client in each step."""
    server_seconds: float
    """CPU time that the server took for one step, with whatever else it did meanwhile."""
    resident_mib: float
    attacks: str


async def _train(address: str, spec: RunSpec, steps: int) -> tuple[list[float], list[float]]:
    clients = [HonestClient(address, spec, f"c-{index:02}") for index in range(HONEST)]
    whole, each = list[float](), list[float]()
    key = StepKey(0, 0)
    try:
        await asyncio.gather(*(client.open() for client in clients))
        for number in range(WARM_UP + steps):
            start = time.monotonic()
            seconds = await asyncio.gather(*(client.step(key) for client in clients))
            if number >= WARM_UP:
                whole.append(time.monotonic() - start)
                each += seconds
            key = key.following(spec.accumulation)
    finally:
        for client in clients:
            await client.close()
    return whole, each


def measure(folder: Path, model: Path, hostile: bool, steps: int = STEPS) -> Measured:
    """A fresh server and so many steps of the honest clients on it."""
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    addresses = [f"--listen={ANY_PORT}", f"--control={ANY_PORT}", f"--model={model}"]
    server = Service("lesft-server", *options, *addresses, state=folder, cwd=folder.parent)
    attackers = None
    try:
        server.wait_for_line("ready")
        address = server.address("grpc")
        if hostile:
            command = [sys.executable, "-m", "tests.hostile.attackers", address]
            attackers = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert attackers.stdout is not None
            assert attackers.stdout.readline() == "attacking\n"
            time.sleep(2)
        process = psutil.Process(server._process.pid)
        before = sum(process.cpu_times()[:2])
        whole, each = asyncio.run(_train(address, describe(address), steps))
        spent = (sum(process.cpu_times()[:2]) - before) / (WARM_UP + steps)
        resident = process.memory_info().rss / (1 << 20)
        attacks = attackers.communicate("", 30)[0].strip() if attackers else ""
        assert "Traceback" not in server.output, server.output
        return Measured(whole, each, spent, resident, attacks)
    finally:
        if attackers is not None:
            attackers.kill()
            attackers.wait()
        server.end()


def report_crowd() -> bool:
    """Interleaved repeats, medians and their ratio, on standard output."""
    say = sys.stdout.write
    medians: dict[bool, list[float]] = {False: [], True: []}
    say(f"{'':10}{'median ms':>10}{'p95 ms':>9}{'client p95':>11}{'server CPU':>11}{'MiB':>6}\n")
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder) / "model")
        for repeat in range(REPEATS):
            for hostile in (False, True):
                state = Path(folder) / f"{repeat}-{hostile}"
                measured = measure(state, model, hostile)
                median = statistics.median(measured.step_seconds)
                medians[hostile].append(median)
                say(
                    f"{'hostile' if hostile else 'alone':10}{median * 1000:10.1f}"
                    f"{_p95(measured.step_seconds):9.1f}{_p95(measured.client_seconds):11.1f}"
                    f"{measured.server_seconds * 1000:11.1f}"
                    f"{measured.resident_mib:6.0f} {measured.attacks}\n"
                )
                sys.stdout.flush()
    ratios = [with_8 / alone for alone, with_8 in zip(medians[False], medians[True], strict=True)]
    say(f"ratio of medians, repeat by repeat: {', '.join(f'{ratio:.2f}' for ratio in ratios)}\n")
    say(f"median ratio: {statistics.median(ratios):.2f}\n")
    return True


def _p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1] * 1000
