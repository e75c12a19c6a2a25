"""A tiny model, a server on a real socket in this process, and clients for it."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lesft.adapters import attach_lora
from lesft.channel import open_channel
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_to_message, lora_to_message
from lesft.step_messages import Limits
from lesft.v1 import training_pb2
from lesft.weights import Checkpoint, load_front
from lesft.wire import WireCounter
from lesft_client.data import EncodedSample
from lesft_client.front import Front
from lesft_client.link import Patience, ServerLink
from lesft_client.status import Status
from lesft_client.trainer import Average, Trainer
from lesft_server.server import Server
from lesft_server.session import Engine
from lesft_server.settings import ServerSettings
from tests import tiny_models
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

CPU = torch.device("cpu")
RAW: dict[str, Any] = {
    "activation_encoding": "raw",
    "gradient_encoding": "raw",
    "adapter_encoding": "raw",
}
"""What is compared to the last bit with what never travelled."""

_BUILDING = threading.Lock()
"""One model at a time: `init_empty_weights` changes torch for all threads meanwhile."""


def save_tiny_model(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random four-layer model in Hugging Face layout; returns the folder."""
    tiny_models.save_tiny_model(folder, family, seed, **changes)
    return folder


def random_samples(num_samples: int, seed: int = 0) -> list[EncodedSample]:
    """Samples of random token ids, of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    return [EncodedSample(ids(4, 9), ids(8, 14), [*ids(3, 7), 2]) for _ in range(num_samples)]


def server_settings(model: Path, state: Path, **options: Any) -> ServerSettings:
    """Settings of a small deterministic run."""
    values: dict[str, Any] = {
        "model": str(model),
        "state": state,
        "listen": "127.0.0.1:0",
        "control": "127.0.0.1:0",
        "clients": 1,
        "rounds": 2,
        "cut_layer": 1,
        "accumulation": 4,
        "aggregation_interval": 1,
        "max_length": 64,
        "seed": 7,
        **RAW,
        "lora": {"dropout": 0.0},
        "optimizer": {"learning_rate": 1e-2},
    }
    return ServerSettings(**{**values, **options})


@dataclass
class RunningServer:
    """A server of this process and where it listens."""

    server: Server
    grpc: str
    control: str

    @property
    def spec(self) -> RunSpec:
        return self.engine.run.spec

    @property
    def engine(self) -> Engine:
        assert self.server.engine is not None
        return self.server.engine


@contextmanager
def running_server(settings: ServerSettings) -> Iterator[RunningServer]:
    """Serve on an event loop in a thread of its own while the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(settings)

    def on_loop(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    try:
        grpc_address, control_address = on_loop(server.start())
        yield RunningServer(server, grpc_address, control_address)
    finally:
        on_loop(server.stop("the test is over"))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass
class MeanAggregator:
    """An aggregator in memory: the plain mean of as many adapters as there are clients."""

    clients: int
    _submitted: dict[int, list[Mapping[str, torch.Tensor]]] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def submit(
        self, base: Average, state: Mapping[str, torch.Tensor], receipt: bytes = b""
    ) -> None:
        with self._changed:
            self._submitted.setdefault(base.version, []).append(state)
            self._changed.notify_all()

    def fetch(
        self, version: int, like: Mapping[str, torch.Tensor], base: Average
    ) -> dict[str, torch.Tensor]:
        with self._changed:
            waiting = lambda: len(self._submitted.get(version - 1, [])) == self.clients  # noqa: E731
            assert self._changed.wait_for(waiting, 60)
            states = self._submitted[version - 1]
        return {
            name: torch.stack([state[name].double() for state in states]).mean(0).float()
            for name in like
        }


def open_session(
    address: str, limits: Limits, fingerprint: str = "", **changes: Any
) -> tuple[ServerLink, Callable[[], None]]:
    """An open session, and what cuts it off; `changes` are fields of the opening."""
    spec = limits.spec
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "client_id": "client-0",
        "run_id": spec.run_id,
        "front_fingerprint": fingerprint or spec.front_fingerprint,
        "cut_layer": spec.cut_layer,
        "lora": lora_to_message(spec.lora),
        "activation_encoding": encoding_to_message(spec.activation_encoding),
        "gradient_encoding": encoding_to_message(spec.gradient_encoding),
        "num_samples": 1,
    }
    opening = training_pb2.OpenSession(**{**fields, **changes})
    link = ServerLink(
        lambda: open_channel(address),
        opening,
        limits,
        f"server {address}",
        WireCounter(),
        Patience(first_contact=1, reconnect=1, stall=60),
    )
    link.resume(link.open().round)
    return link, link.close


def limits_of(spec: RunSpec) -> Limits:
    """The limits of a run of the tiny model."""
    return Limits(spec, HIDDEN_SIZE, VOCAB_SIZE)


def make_front(model: Path, spec: RunSpec, client_id: str) -> Front:
    """A front with fresh adapters."""
    with _BUILDING:
        front = load_front(Checkpoint(model), spec.cut_layer, torch.float32, CPU)
        attach_lora(front, spec.lora, spec.seed, 0)
    return Front(front, spec, client_id)


def train_clients(
    server: RunningServer,
    model: Path,
    samples: Sequence[Sequence[EncodedSample]],
    in_flight: int = 0,
) -> list[tuple[Front, Status]]:
    """Train one client per list of samples over gRPC to the run's end."""
    aggregator = MeanAggregator(len(samples))

    def client(index: int) -> tuple[Front, Status]:
        name = f"client-{index}"
        front = make_front(model, server.spec, name)
        stream, close = open_session(
            server.grpc,
            limits_of(server.spec),
            client_id=name,
            num_samples=len(samples[index]),
        )
        status = Status(name, WireCounter())
        trainer = Trainer(front, stream, aggregator, samples[index], status, in_flight)
        try:
            trainer.train()
            stream.leave("")
        finally:
            close()
        return front, status

    with ThreadPoolExecutor(len(samples)) as pool:
        return list(pool.map(client, range(len(samples))))


def back_model(server: RunningServer) -> PreTrainedModel:
    """The server's part of the model."""
    return server.engine.back.model
