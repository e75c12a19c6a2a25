"""A client that sends whatever it is told, and what a test wants to know of the server after."""

import asyncio
import pathlib
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import httpx
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lesft.adapters import lora_state
from lesft.bundle import BundleReader, bundle_chunks
from lesft.errors import LesftError, status_of
from lesft.interceptors import error_from
from lesft.micro_batch import MicroBatch, Path, StepKey, StepResult, Targets
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_to_message, lora_to_message
from lesft.step_messages import held_out_to_message, micro_batch_to_message
from lesft.v1 import heartbeat_pb2, training_pb2
from lesft.v1.training_pb2 import TrainRequest, TrainResponse
from lesft_client.data import EncodedSample
from lesft_client.link import ServerLink
from tests.harness import (
    RunningServer,
    back_model,
    limits_of,
    make_front,
    open_session,
)
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

SERVICES = (
    *("", "lesft.v1.TrainingService", "lesft.v1.ModelService", "lesft.v1.InferenceService"),
)


@dataclass(frozen=True)
class Refusal:
    """How a call ended: its gRPC status, the error of our tree that it stands for, its message."""

    code: grpc.StatusCode
    kind: type[LesftError]
    message: str


@contextmanager
def without_pauses() -> Iterator[None]:
    """Sessions in vain open at once, however many: what else is tested has no time to lose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lesft_server.pauses.Pauses.seconds", lambda pauses, client_id: 0.0)
        yield


def refusal(kind: type[LesftError], message: str) -> Refusal:
    """The refusal that an error of our tree becomes."""
    return Refusal(status_of(kind("")).grpc, kind, message)


def refusal_of(error: grpc.RpcError) -> Refusal:
    """The refusal that a failed call tells its caller."""
    return Refusal(error.code(), type(error_from(error, "server")), error.details())


class RawSession:
    """A Train stream without any of our client's care. Bytes are sent as they are.

    Heartbeats are passed over unless a test asks for them.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._outgoing: queue.Queue[TrainRequest | bytes | None] = queue.Queue()
        self.call: Any = channel.stream_stream(
            "/lesft.v1.TrainingService/Train",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=TrainResponse.FromString,
        )(iter(self._outgoing.get, None), timeout=30)

    def send(self, *messages: TrainRequest | bytes) -> None:
        """Send messages, one after another."""
        for message in messages:
            self._outgoing.put(message)

    def close_requests(self) -> None:
        """Close the stream of requests, as a client does after its leave."""
        self._outgoing.put(None)

    def receive(self) -> TrainResponse:
        """The next message, which must be there."""
        return next(message for message in self.call if not message.HasField("heartbeat"))

    def receive_heartbeat(self) -> str:
        """What the server waits for by its next heartbeat, which must be the next message."""
        message: TrainResponse = next(self.call)
        assert message.WhichOneof("message") == "heartbeat"
        return message.heartbeat.waiting_for

    def receive_answer(self) -> tuple[training_pb2.StepResult, bytes]:
        """The next result and its bundle, which is read whole and checked.

        How long it took is no part of it: a repeated one took other times.
        """
        header = self.receive().step
        header.ClearField("times")
        reader = BundleReader(header.bundle, 1 << 30)
        while not reader.complete:
            reader.add(self.receive().chunk)
        return header, reader.data()

    def receive_step(self) -> training_pb2.StepResult:
        """As `receive_answer`, without the bundle."""
        return self.receive_answer()[0]

    def refusal(self) -> Refusal:
        """How the call ends, which must not be well; what it sends before is not looked at."""
        with pytest.raises(grpc.RpcError) as caught:
            for _ in self.call:
                pass
        return refusal_of(caught.value)

    def rest(self) -> list[TrainResponse]:
        """All messages to the end of the call, which must be a good one."""
        return [message for message in self.call if not message.HasField("heartbeat")]


@contextmanager
def raw_channel(address: str, *options: tuple[str, int]) -> Iterator[grpc.Channel]:
    """A connection of its own that sets no limit to what is sent; closed after the block."""
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=[*own, *options]) as channel:
        yield channel


def opening(spec: RunSpec, client_id: str = "a", **changes: Any) -> TrainRequest:
    """What a right client sends first; `changes` are fields of the opening."""
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "client_id": client_id,
        "run_id": spec.run_id,
        "front_fingerprint": spec.front_fingerprint,
        "cut_layer": spec.cut_layer,
        "lora": lora_to_message(spec.lora),
        "activation_encoding": encoding_to_message(spec.activation_encoding),
        "gradient_encoding": encoding_to_message(spec.gradient_encoding),
        "num_samples": 1,
    }
    return TrainRequest(open=training_pb2.OpenSession(**{**fields, **changes}))


def join(
    channel: grpc.Channel,
    spec: RunSpec,
    client_id: str,
    at: StepKey | None = None,
    **changes: Any,
) -> RawSession:
    """A session that the server has opened; one that stands `at` a key must be let go on there."""
    if at is not None:
        changes["position"] = training_pb2.Position(round=at.round, micro=at.micro)
    session = RawSession(channel)
    session.send(opening(spec, client_id, **changes))
    message = session.receive()
    assert message.WhichOneof("message") == "opened"
    if at is not None:
        assert (next_of(message.opened), message.opened.course) == (
            at,
            training_pb2.COURSE_CONTINUE,
        )
    return session


def next_of(opened: training_pb2.SessionOpened) -> StepKey:
    """Where the server wants its client to go on."""
    return StepKey(opened.next.round, opened.next.micro)


# ---------------------------------------------------------------------- what a client sends

BASE_LENGTHS, REFERENCE_LENGTHS, TARGET_LENGTHS = (7, 5), (8, 6), (3, 2)


def random_path(lengths: Sequence[int], seed: int = 0) -> Path:
    """Random activations of sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return Path(torch.randn(sum(lengths), HIDDEN_SIZE, generator=generator), tuple(lengths))


def random_targets(lengths: Sequence[int], seed: int = 0) -> Targets:
    """Random token ids of targets of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return Targets(
        torch.randint(0, VOCAB_SIZE, (sum(lengths),), generator=generator), tuple(lengths)
    )


def make_batch(
    key: StepKey,
    base_lengths: Sequence[int] = BASE_LENGTHS,
    reference_lengths: Sequence[int] = REFERENCE_LENGTHS,
    target_lengths: Sequence[int] = TARGET_LENGTHS,
) -> MicroBatch:
    """A right micro-batch of random numbers."""
    return MicroBatch(
        key,
        random_path(base_lengths, seed=1),
        random_path(reference_lengths, seed=2),
        random_targets(target_lengths),
    )


def with_chunks(message: TrainRequest, data: bytes) -> list[TrainRequest]:
    """A message and its bundle."""
    return [message, *(TrainRequest(chunk=chunk) for chunk in bundle_chunks(data))]


def other_batch(key: StepKey) -> MicroBatch:
    """One that differs from `make_batch`'s in its labels only."""
    return replace(make_batch(key), targets=random_targets(TARGET_LENGTHS, seed=9))


def step_messages(batch: MicroBatch) -> list[TrainRequest]:
    """A micro-batch as it travels."""
    header, data = micro_batch_to_message(batch, "raw")
    return with_chunks(TrainRequest(micro_batch=header), data)


def held_out_messages(index: int = 0) -> list[TrainRequest]:
    """A right held-out request as it travels."""
    header, data = held_out_to_message(
        index, random_path(BASE_LENGTHS, seed=3), random_targets(TARGET_LENGTHS), "raw"
    )
    return with_chunks(TrainRequest(held_out=header), data)


Messages = Callable[[StepKey, Sequence[int], Sequence[int]], list[TrainRequest]]
"""The messages of a micro-batch: its key, its samples, and which of them are enclosed."""


def bent(
    messages: Messages,
    key: StepKey,
    samples: Sequence[int],
    enclosed: Sequence[int],
    /,
    **fields: Sequence[int],
) -> list[TrainRequest]:
    """A header and its bundle, with other numbers in the header."""
    first, *chunks = messages(key, samples, enclosed)
    for name, values in fields.items():
        first.micro_batch.ClearField(name)  # type: ignore[arg-type]
        getattr(first.micro_batch, name).extend(values)
    return [first, *chunks]


def heartbeat() -> TrainRequest:
    """The message of a client that is there and has nothing to send."""
    return TrainRequest(heartbeat=heartbeat_pb2.Heartbeat())


def leaving(reason: str = "") -> TrainRequest:
    """The message of a client that goes."""
    return TrainRequest(leave=training_pb2.Leave(reason=reason))


NARROW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 << 10))
"""Makes a client's end take few bytes that are not read, so that the server soon has to wait."""


def bulky_round(round_index: int) -> list[TrainRequest]:
    """The micro-batches of a round; the answer to each is four times what a narrow client takes."""
    messages = []
    for micro in range(2):
        batch = make_batch(StepKey(round_index, micro), (900, 900), (), (1, 1))
        messages += step_messages(replace(batch, reference=None))
    return messages


# ---------------------------------------------------------------------- right clients


class Crew:
    """Right clients named client-0, client-1, ... in one thread: they go step by step together.

    They do not average their adapters. Use it in a `with` block, which closes the connections.
    """

    def __init__(
        self,
        server: RunningServer,
        model: pathlib.Path,
        samples: Sequence[Sequence[EncodedSample]],
    ) -> None:
        """Each list of samples is one client's; all join when the block begins."""
        self._server = server
        self._spec = server.spec
        self._samples = samples
        self._streams: list[ServerLink] = []
        self.fronts = [
            make_front(model, server.spec, f"client-{index}") for index in range(len(samples))
        ]

    def __enter__(self) -> "Crew":
        with ExitStack() as closing:
            for index, samples in enumerate(self._samples):
                stream, close = open_session(
                    self._server.grpc,
                    limits_of(self._spec),
                    client_id=f"client-{index}",
                    num_samples=len(samples),
                )
                closing.callback(close)
                self._streams.append(stream)
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def train_round(self, round_index: int) -> list[list[StepResult]]:
        """One round of every client; each micro-batch's results, client after client."""
        results = [
            self._step(StepKey(round_index, micro)) for micro in range(self._spec.accumulation)
        ]
        for front in self.fronts:
            front.step(round_index)
        return results

    def _step(self, key: StepKey) -> list[StepResult]:
        sent = []
        for front, stream, samples in zip(self.fronts, self._streams, self._samples, strict=True):
            first = (key.round * self._spec.accumulation + key.micro) * self._spec.batch_size
            chosen = [samples[(first + i) % len(samples)] for i in range(self._spec.batch_size)]
            sent.append(front.forward(key, chosen))
            stream.send(sent[-1].micro_batch)
        results = [stream.receive() for stream in self._streams]
        for front, forward, result in zip(self.fronts, sent, results, strict=True):
            front.backward(forward, result)
        return results

    def leave(self) -> None:
        """All leave, as after the last round."""
        for stream in self._streams:
            stream.leave("")


def train_to_the_end(
    server: RunningServer, model: pathlib.Path, samples: Sequence[Sequence[EncodedSample]]
) -> dict[str, torch.Tensor]:
    """Train a whole run; the adapters of the server and of all clients."""
    with Crew(server, model, samples) as crew:
        for round_index in range(server.spec.rounds):
            crew.train_round(round_index)
        crew.leave()
    adapters = lora_state(back_model(server), server.spec.cut_layer)
    for index, front in enumerate(crew.fronts):
        adapters |= {f"client-{index} {name}": value for name, value in front.adapter().items()}
    return adapters


# ---------------------------------------------------------------------- what is asked after

Snapshot = dict[str, tuple[torch.Tensor, torch.Tensor | None]]


def snapshot(server: RunningServer) -> Snapshot:
    """Every tensor of the server's model and its gradient, after all steps that were queued."""

    def copy() -> Snapshot:
        return {
            name: (tensor.detach().clone(), None if tensor.grad is None else tensor.grad.clone())
            for name, tensor in back_model(server).named_parameters()
        }

    return asyncio.run(server.engine.device.run(copy))


def assert_unchanged(server: RunningServer, before: Snapshot) -> None:
    """The model's tensors and gradients are those of the snapshot, bit for bit."""
    after = snapshot(server)
    assert after.keys() == before.keys()
    changed = [
        name
        for name, (tensor, gradient) in before.items()
        if not torch.equal(tensor, after[name][0]) or not _equal(gradient, after[name][1])
    ]
    assert changed == []


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def assert_serving(server: RunningServer) -> None:
    """The health service says SERVING, for each service and the whole, and so does the HTTP one."""
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in SERVICES:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert httpx.get(f"http://{server.control}/healthz").text == "ok\n"


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Return once the condition holds; for what has no event to wait for."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.005)
