"""The client's side of the aggregation: what it hands in and gets, and when it stops waiting."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from lesft.bundle import bundle_chunks, bundle_info
from lesft.channel import open_channel
from lesft.errors import AlreadyJoined, BundleError, RunStopped, Unreachable
from lesft.spec import AdapterEncoding
from lesft.tensors import encode_tensors
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1 import aggregation_pb2_grpc, heartbeat_pb2
from lesft.wire import WireCounter
from lesft_client.aggregation import Aggregator
from lesft_client.back import GoBack
from lesft_client.data import EncodedSample
from lesft_client.front import Front
from lesft_client.link import Patience
from lesft_client.status import Status
from lesft_client.train import TrainCommand
from lesft_client.trainer import BEGINNING, Average, Trainer
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


MakeClient = Callable[..., Aggregator]
PATIENT = Patience(600, 600, 600)


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    """Makes clients of the aggregator at an address; closes them in the end."""
    made: list[Aggregator] = []

    def make(
        address: str,
        name: str = "a",
        num_samples: int = 1,
        patience: Patience = PATIENT,
        encoding: AdapterEncoding = "raw",
        **options: Any,
    ) -> Aggregator:
        made.append(
            Aggregator(
                lambda: open_channel(address),
                "aggregator a:1",
                name,
                "lesft",
                "sha256:run",
                num_samples,
                encoding,
                patience,
                WireCounter(),
                **options,
            )
        )
        return made[-1]

    yield make
    for client in made:
        client.close()


def adapter(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((2, 3), value), "y": torch.full((4,), -value)}


def test_clients_get_the_mean_by_their_number_of_samples(
    address: str, make_client: MakeClient
) -> None:
    clients = [make_client(address, "a", 10), make_client(address, "b", 30)]
    assert [client.join() for client in clients] == [0, 0]
    for client, value in zip(clients, (1.0, 5.0), strict=True):
        client.submit(BEGINNING, adapter(value))
    for client in clients:
        mean = client.fetch(1, like=adapter(0.0))
        assert mean.keys() == {"x", "y"}
        assert torch.equal(mean["x"], torch.full((2, 3), 4.0))
        assert torch.equal(mean["y"], torch.full((4,), -4.0))


def test_an_average_of_another_shape_is_refused(address: str, make_client: MakeClient) -> None:
    for name in "ab":
        make_client(address, name).submit(BEGINNING, adapter(1.0))
    with pytest.raises(BundleError, match=r"'x' must have shape \[2, 4\], got \[2, 3\]"):
        make_client(address).fetch(1, like={**adapter(0.0), "x": torch.zeros(2, 4)})


def large_adapter(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(8, 500, generator=generator) for name in "xyz"}


def adapter_bytes(client: Aggregator) -> int:
    return sum(kinds["adapters"] for kinds in client._wire.by_kind().values())


@pytest.mark.parametrize(("encoding", "share"), [("int8", 0.26), ("int4", 0.13)])
def test_clients_that_send_what_has_changed_go_on_from_the_same_average(
    address: str, make_client: MakeClient, encoding: AdapterEncoding, share: float
) -> None:
    clients = [make_client(address, name, encoding=encoding) for name in "ab"]
    average, begun = BEGINNING, large_adapter(0)
    whole_bytes = 3 * 8 * 500 * 4
    for version in (1, 2, 3):
        before = adapter_bytes(clients[0])
        for seed, client in enumerate(clients):
            change = large_adapter(10 * version + seed)
            client.submit(average, {n: begun[n] + 1e-3 * change[n] for n in begun})
        fetched = [client.fetch(version, begun, average) for client in clients]
        newcomer = make_client(address, "a", encoding=encoding).fetch(version, begun)
        for name in begun:
            assert torch.equal(fetched[0][name], fetched[1][name])
            if version > 1:  # it cannot add a change to what it does not have
                assert torch.equal(fetched[0][name], newcomer[name])
            step = torch.stack([large_adapter(10 * version + seed)[name] for seed in (0, 1)])
            off = fetched[0][name] - (begun[name] + 1e-3 * step.mean(0))
            assert off.norm() < (0.01 if version == 1 else 1e-3 * 0.2) * begun[name].norm()
        spent = adapter_bytes(clients[0]) - before
        assert spent < 2 * whole_bytes * (0.28 if version == 1 else share)
        average, begun = Average(version, fetched[0]), fetched[0]


@pytest.mark.parametrize(
    "error",
    [RunStopped("the run has ended"), Unreachable("server s:1: connection reset"), GoBack(3)],
)
def test_waiting_for_a_version_ends_at_once_when_it_is_not_wanted_any_more(
    address: str, make_client: MakeClient, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwanted, reading = threading.Event(), threading.Event()

    def still_wanted() -> None:
        if unwanted.is_set():
            raise error

    client = make_client(address, still_wanted=still_wanted)
    client.submit(BEGINNING, adapter(1.0))
    read = client._read

    def noted(*arguments: Any) -> bytes:
        reading.set()
        return read(*arguments)

    monkeypatch.setattr(client, "_read", noted)
    client.interrupt()  # nothing to interrupt yet
    with ThreadPoolExecutor(1) as pool:
        fetched: Future[object] = pool.submit(client.fetch, 1, adapter(0.0))
        assert reading.wait(SECONDS)
        assert not fetched.done()
        unwanted.set()
        client.interrupt()
        # Its patience is ten minutes, so this also says that nothing is tried again.
        assert fetched.exception(SECONDS) is error
    with pytest.raises(type(error)):
        client.fetch(1, adapter(0.0))
    unwanted.clear()  # it went back to a checkpoint, and waits again
    make_client(address, "b").submit(BEGINNING, adapter(2.0))
    assert torch.equal(client.fetch(1, adapter(0.0))["x"], torch.full((2, 3), 1.5))


# ---------------------------------------------------------------------- silence and heartbeats


class FakeAggregation(aggregation_pb2_grpc.AggregationServiceServicer):
    """Notes from which connection every call came; one fetch after the other is as scripted."""

    def __init__(self, *fetches: Callable[[threading.Event], Iterator[pb.FetchResponse]]) -> None:
        self._fetches = list(fetches)
        self.peers: dict[str, list[str]] = {"Join": [], "Submit": [], "Fetch": []}
        self.silent: set[str] = set()
        self.heartbeat_seconds = 0.1

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        self._begin("Join", context)
        return pb.JoinResponse(version=4, heartbeat_seconds=self.heartbeat_seconds)

    def Submit(self, request_iterator: Any, context: grpc.ServicerContext) -> pb.SubmitResponse:
        self._begin("Submit", context)
        return pb.SubmitResponse(version=1, received=sum(1 for _ in request_iterator))

    def Fetch(
        self, request: pb.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.FetchResponse]:
        yield from self._fetches.pop(0)(self._begin("Fetch", context))

    def _begin(self, method: str, context: grpc.ServicerContext) -> threading.Event:
        """Returns what is set once the call is over; does not return before to a silent one."""
        over = threading.Event()
        context.add_callback(over.set)
        self.peers[method].append(context.peer())
        if method in self.silent:
            self.silent.remove(method)
            assert over.wait(SECONDS), "the client never gave up"
        return over


@contextmanager
def serving(fake: FakeAggregation) -> Iterator[str]:
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        aggregation_pb2_grpc.add_AggregationServiceServicer_to_server(fake, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def sends_adapter(over: threading.Event) -> Iterator[pb.FetchResponse]:
    data = encode_tensors(adapter(2.0), "raw")
    yield pb.FetchResponse(aggregate=pb.Aggregate(version=1, bundle=bundle_info(data)))
    for chunk in bundle_chunks(data):
        yield pb.FetchResponse(chunk=chunk)


def heartbeats(*waits: str) -> Iterator[pb.FetchResponse]:
    for waiting_for in waits:
        time.sleep(0.15)
        yield pb.FetchResponse(heartbeat=heartbeat_pb2.Heartbeat(waiting_for=waiting_for))


def is_silent(over: threading.Event) -> Iterator[pb.FetchResponse]:
    yield from heartbeats("b")
    assert over.wait(SECONDS), "the client never gave up"


def is_slow(over: threading.Event) -> Iterator[pb.FetchResponse]:
    yield from heartbeats("b, c", "b, c", "c", "c", "c", "c")
    yield from sends_adapter(over)


def stops_in_the_middle(over: threading.Event) -> Iterator[pb.FetchResponse]:
    yield next(sends_adapter(over))
    assert over.wait(SECONDS), "the client never gave up"


IMPATIENT = Patience(first_contact=SECONDS, reconnect=SECONDS, stall=0.4)


def test_heartbeats_keep_a_fetch_waiting_and_say_what_for(make_client: MakeClient) -> None:
    fake, heard = FakeAggregation(is_slow), list[str]()
    with serving(fake) as address:
        client = make_client(address, patience=IMPATIENT, on_waiting=heard.append)
        assert client.join() == 4
        assert torch.equal(client.fetch(1, adapter(0.0))["x"], torch.full((2, 3), 2.0))
    assert heard == ["b, c", "b, c", "c", "c", "c", "c", ""]
    assert len(fake.peers["Fetch"]) == 1


@pytest.mark.parametrize("silence", [is_silent, stops_in_the_middle])
def test_a_fetch_that_falls_silent_is_made_again_over_a_new_connection(
    make_client: MakeClient, silence: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeAggregation(silence, sends_adapter)
    with serving(fake) as address:
        client = make_client(address, patience=IMPATIENT)
        client.join()
        start = time.monotonic()
        assert torch.equal(client.fetch(1, adapter(0.0))["x"], torch.full((2, 3), 2.0))
        assert 0.3 < time.monotonic() - start < 5
    first, second = fake.peers["Fetch"]
    assert first == fake.peers["Join"][0]
    assert second != first
    assert "aggregator a:1: nothing was heard of it for 0.4 s; trying again" in caplog.text


@pytest.mark.parametrize("method", ["Join", "Submit"])
def test_a_call_that_is_not_answered_is_made_again_over_a_new_connection(
    make_client: MakeClient, method: str
) -> None:
    fake = FakeAggregation()
    fake.silent = {method}
    with serving(fake) as address:
        client = make_client(address, patience=IMPATIENT)
        assert client.join() == 4
        client.submit(Average(4, {}), adapter(1.0))
    assert len(set(fake.peers[method])) == 2


def test_an_aggregator_whose_heartbeats_are_rarer_than_the_patience_is_not_taken_for_dead(
    make_client: MakeClient,
) -> None:
    def is_slower(over: threading.Event) -> Iterator[pb.FetchResponse]:
        time.sleep(0.8)
        yield from sends_adapter(over)

    fake = FakeAggregation(is_slower)
    fake.heartbeat_seconds = 0.5
    with serving(fake) as address:
        client = make_client(address, patience=IMPATIENT)
        client.join()
        client.fetch(1, adapter(0.0))
    assert len(fake.peers["Fetch"]) == 1


def test_silence_is_given_up_when_the_patience_ends(make_client: MakeClient) -> None:
    fake = FakeAggregation(is_silent, is_silent, is_silent)
    with serving(fake) as address:
        client = make_client(address, patience=Patience(SECONDS, 0.6, stall=0.4))
        client.join()
        with pytest.raises(Unreachable) as caught:
            client.fetch(1, adapter(0.0))
    assert "nothing was heard of it for 0.4 s (tried for" in str(caught.value)
    assert "--reconnect-seconds waits longer" in str(caught.value)


# ---------------------------------------------------------------------- in a run


class GoingAway:
    """An aggregator for a client that is stopped by its user when it should hand in its adapter."""

    def __init__(self, when: threading.Event) -> None:
        self._when = when

    def submit(
        self, base: Average, state: Mapping[str, torch.Tensor], receipt: bytes = b""
    ) -> None:
        assert self._when.wait(SECONDS)
        raise KeyboardInterrupt

    def fetch(
        self, version: int, like: Mapping[str, torch.Tensor], base: Average
    ) -> dict[str, torch.Tensor]:
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


def test_a_client_that_waits_for_the_others_adapters_hears_from_its_server_that_it_is_out(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That another client leaves is no reason: it may come back. Its session taken over is one."""
    model = save_model_with_tokenizer(tmp_path / "model")
    waiting = threading.Event()
    fetch = Aggregator.fetch

    def noted(
        self: Aggregator, version: int, like: Mapping[str, torch.Tensor], base: Average
    ) -> dict[str, torch.Tensor]:
        waiting.set()
        return fetch(self, version, like, base)

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
        assert a.exception(SECONDS) is None
        assert not b.done()
        _, close = open_session(
            server.grpc,
            limits_of(server.spec),
            client_id="b",
            num_samples=server.engine.run.members["b"].num_samples,
            instance_id=(tmp_path / "state/instance").read_text().split()[0],
        )
        error = b.exception(SECONDS)
        close()
    assert type(error) is AlreadyJoined
    assert str(error) == f"server {server.grpc}: client 'b' has opened another session"
