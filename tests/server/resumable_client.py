"""A client that outlives its connections, its process and its server, over real gRPC."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lesft.adapters import lora_state
from lesft.channel import open_channel
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_to_message, lora_to_message
from lesft.v1 import training_pb2
from lesft.wire import Kind, WireCounter
from lesft_client.back import Turn
from lesft_client.data import EncodedSample
from lesft_client.link import Patience, ServerLink
from lesft_client.recovery import ClientCheckpoints
from lesft_client.status import Status
from lesft_client.trainer import Trainer
from lesft_testbed.chaos_run import free_addresses
from tests.harness import (
    RunningServer,
    back_model,
    limits_of,
    make_front,
    running_server,
    server_settings,
)
from tests.server.harness import wait_until


@contextmanager
def serving(model: Path, state: Path, **options: Any) -> Iterator[RunningServer]:
    """Three rounds of two micro-batches of one sample."""
    values: dict[str, Any] = {"rounds": 3, "accumulation": 2, "threads": 1}
    with running_server(server_settings(model, state, **{**values, **options})) as server:
        yield server


@dataclass
class ResumableClient:
    """One client as a process has it: its checkpoints outlive it, and so does its instance."""

    model: Path
    spec: RunSpec
    address: str
    samples: Sequence[EncodedSample]
    state: Path
    name: str = "client-0"
    on_round: Callable[["ResumableClient"], None] = lambda client: None

    def __post_init__(self) -> None:
        self.status = Status(self.name, WireCounter())
        self.wire = self.status.wire
        self.keeper = ClientCheckpoints(
            self.state, "sha256:run", self.samples, self.status, self.wire, lambda reason: None
        )
        self.front = make_front(self.model, self.spec, self.name)
        self.link = ServerLink(
            lambda: open_channel(self.address),
            training_pb2.OpenSession(
                protocol_version=PROTOCOL_VERSION,
                client_id=self.name,
                run_id=self.spec.run_id,
                front_fingerprint=self.spec.front_fingerprint,
                cut_layer=self.spec.cut_layer,
                lora=lora_to_message(self.spec.lora),
                activation_encoding=encoding_to_message(self.spec.activation_encoding),
                gradient_encoding=encoding_to_message(self.spec.gradient_encoding),
                num_samples=len(self.samples),
                instance_id=f"{self.name} here",
            ),
            limits_of(self.spec),
            "server",
            self.wire,
            Patience(first_contact=30, reconnect=30, stall=60),
            self.keeper.rounds,
        )
        self.trainer = Trainer(
            self.front, self.link, None, self.samples, self.status, keeper=self.keeper
        )

    def run(self) -> None:
        """Join, go on where the server wants, train to the end; whatever ends it ends the link."""
        try:
            turn: Turn | None = self.link.open()
            if not self.keeper.rounds():
                self.link.resume(0)
                self.trainer.save()
                turn = None
            while True:
                try:
                    if turn is not None:
                        self.trainer.turn(turn)
                    self.trainer.train(lambda: self.on_round(self))
                    break
                except Turn as new:
                    turn = new
            self.link.leave("")
        finally:
            self.link.close()

    def sent_bytes(self, kind: Kind) -> int:
        return self.wire.by_kind()["up"][kind]


def adapters_of(server: RunningServer) -> dict[str, torch.Tensor]:
    return lora_state(back_model(server), server.spec.cut_layer)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def base_tokens(samples: Sequence[EncodedSample]) -> int:
    return sum(len(s.base_ids) + len(s.target_ids) for s in samples)


def reference_tokens(samples: Sequence[EncodedSample]) -> int:
    return sum(len(s.reference_ids) + len(s.target_ids) for s in samples)


def target_tokens(samples: Sequence[EncodedSample]) -> int:
    return sum(len(s.target_ids) for s in samples)


def train_alone(
    model: Path, folder: Path, samples: Sequence[EncodedSample], **options: Any
) -> tuple[ResumableClient, dict[str, torch.Tensor]]:
    """One client's whole run."""
    with serving(model, folder / "server", **options) as server:
        before = adapters_of(server)
        client = ResumableClient(model, server.spec, server.grpc, samples, folder / "client")
        client.run()
        after = adapters_of(server)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    return client, after


class Crash(Exception):
    """A client's process is gone."""


def live(
    server: RunningServer,
    model: Path,
    samples: Sequence[EncodedSample],
    state: Path,
    dies_after: int | None = None,
) -> ResumableClient:
    """One life of the client that keeps its checkpoints in `state`."""
    client = ResumableClient(model, server.spec, server.grpc, samples, state)
    if dies_after is None:
        client.run()
        return client

    def die(client: ResumableClient) -> None:
        if client.trainer.round == dies_after:
            raise Crash

    client.on_round = die
    with pytest.raises(Crash):
        client.run()
    return client


def restarted_in_mid_run(
    model: Path,
    folder: Path,
    samples: Sequence[EncodedSample],
    meanwhile: Callable[[], None],
    **options: Any,
) -> tuple[ResumableClient, dict[str, torch.Tensor]]:
    """A run whose server is away after round 2, until its client has sent what comes next."""
    [address] = free_addresses(1)
    options["listen"] = address
    first = ExitStack()
    restart = threading.Event()

    def stop_server(client: ResumableClient) -> None:
        if client.trainer.round == 2 and not restart.is_set():
            first.close()
            meanwhile()
            restart.set()

    server = first.enter_context(serving(model, folder / "server", **options))
    client = ResumableClient(
        model, server.spec, address, samples, folder / "client", on_round=stop_server
    )
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.run)
        assert restart.wait(60)
        wait_until(lambda: client.link._unanswered)
        with serving(model, folder / "server", **options) as server:
            running.result(60)
            return client, adapters_of(server)
