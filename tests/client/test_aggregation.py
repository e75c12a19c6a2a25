"""The client's side of the aggregation: what it hands in and gets, and when it stops waiting."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch

from lesft.channel import open_channel
from lesft.errors import BundleError, LesftError, RunStopped, Unreachable
from lesft_client.aggregation import Aggregator
from lesft_client.data import EncodedSample
from lesft_client.front import Front
from lesft_client.status import Status
from lesft_client.train import TrainCommand
from lesft_client.trainer import Trainer
from lesft_client.wire import WireCounter
from tests.client.harness import running_aggregator, train_settings
from tests.harness import (
    RunningServer,
    limits_of,
    make_front,
    open_session,
    running_server,
    server_settings,
)
from tests.processes.harness import make_samples, save_model_with_tokenizer, write_samples

SECONDS = 60
"""How long a test waits for what is sure to come."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with running_aggregator(tmp_path / "aggregator", clients=2) as address:
        yield address


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with open_channel(address, insecure=False) as channel:
        yield channel


def make_client(channel: grpc.Channel, name: str, num_samples: int = 1) -> Aggregator:
    return Aggregator(channel, "aggregator a:1", name, "lesft", num_samples, 600, WireCounter())


def adapter(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((2, 3), value), "y": torch.full((4,), -value)}


def test_clients_get_the_mean_by_their_number_of_samples(channel: grpc.Channel) -> None:
    clients = [make_client(channel, "a", 10), make_client(channel, "b", 30)]
    assert [client.join() for client in clients] == [0, 0]
    for client, value in zip(clients, (1.0, 5.0), strict=True):
        client.submit(0, adapter(value))
    for client in clients:
        mean = client.fetch(1, like=adapter(0.0))
        assert mean.keys() == {"x", "y"}
        assert torch.equal(mean["x"], torch.full((2, 3), 4.0))
        assert torch.equal(mean["y"], torch.full((4,), -4.0))


def test_an_average_of_another_shape_is_refused(channel: grpc.Channel) -> None:
    for name in "ab":
        make_client(channel, name).submit(0, adapter(1.0))
    with pytest.raises(BundleError, match=r"'x' must have shape \[2, 4\], got \[2, 3\]"):
        make_client(channel, "a").fetch(1, like={**adapter(0.0), "x": torch.zeros(2, 4)})


@pytest.mark.parametrize(
    "error", [RunStopped("the run has ended"), Unreachable("server s:1: connection reset")]
)
def test_waiting_for_a_version_ends_at_once_with_the_run(
    channel: grpc.Channel, error: LesftError, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(channel, "a")
    client.submit(0, adapter(1.0))
    reading = threading.Event()
    read = client._read

    def noted(*arguments: object) -> bytes:
        reading.set()
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "_read", noted)
    with ThreadPoolExecutor(1) as pool:
        fetched: Future[object] = pool.submit(client.fetch, 1, adapter(0.0))
        assert reading.wait(SECONDS)
        assert not fetched.done()
        client.end(error)
        # Its patience is ten minutes, so this also says that nothing is tried again.
        assert fetched.exception(SECONDS) is error
    with pytest.raises(type(error)):
        client.fetch(1, adapter(0.0))


# ---------------------------------------------------------------------- in a run


class GoingAway:
    """An aggregator for a client that is stopped by its user when it should hand in its adapter."""

    def __init__(self, when: threading.Event) -> None:
        self._when = when

    def submit(self, base_version: int, state: Mapping[str, torch.Tensor]) -> None:
        assert self._when.wait(SECONDS)
        raise KeyboardInterrupt

    def fetch(self, version: int, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise AssertionError("it handed nothing in")


def train_and_leave(server: RunningServer, front: Front, when: threading.Event) -> None:
    """Client `a`: trains a round, and leaves at an event instead of handing in its adapter."""
    samples = [EncodedSample([5, 6], [7, 8, 9], [10, 2])]
    stream, close = open_session(server.grpc, limits_of(server.spec), client_id="a")
    try:
        status = Status("a", WireCounter())
        trainer = Trainer(front, stream, GoingAway(when), samples, status)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        stream.leave("stopped by its user")
    finally:
        close()


def test_a_client_that_waits_for_the_others_adapters_hears_that_the_run_was_stopped(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model_with_tokenizer(tmp_path / "model")
    waiting = threading.Event()
    fetch = Aggregator.fetch

    def noted(
        self: Aggregator, version: int, like: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        waiting.set()
        return fetch(self, version, like)

    monkeypatch.setattr(Aggregator, "fetch", noted)
    data = write_samples(tmp_path / "data.jsonl", make_samples(4))
    settings = server_settings(model, tmp_path / "server", clients=2)
    with running_server(settings) as server, ThreadPoolExecutor(2) as pool:
        options = train_settings(
            server, address, tmp_path, client_id="b", model=str(model), data=str(data)
        )
        front = make_front(model, server.spec, "a")  # models are not to be built at the same time
        b = pool.submit(TrainCommand(options).run)
        a = pool.submit(train_and_leave, server, front, waiting)
        error = b.exception(SECONDS)
        assert a.exception(SECONDS) is None
    assert isinstance(error, RunStopped)
    assert "the run has ended: client 'a' left at round 1 micro-batch 0: stopped by its user" in (
        str(error)
    )
