"""A training server that follows a script, stream by stream, over real sockets."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import torch

from lesft.bundle import BundleReader, bundle_chunks
from lesft.errors import LesftError, status_of
from lesft.interceptors import status_details
from lesft.micro_batch import MicroBatch, Path, StepKey, StepResult, Targets
from lesft.spec import RunSpec
from lesft.step_messages import Limits, result_to_message
from lesft.v1 import heartbeat_pb2, training_pb2, training_pb2_grpc
from tests.harness import RAW

SECONDS = 20
"""How long a test waits for what is sure to come."""

WIDTH, VOCAB_SIZE, ACCUMULATION = 4, 8, 2
SPEC = RunSpec(
    clients=1,
    rounds=9,
    accumulation=ACCUMULATION,
    **RAW,
    model_name="fake",
    front_fingerprint="sha256:fake",
    cut_layer=1,
)
LIMITS = Limits(SPEC, WIDTH, VOCAB_SIZE)

Response = training_pb2.TrainResponse


def make_batch(round_index: int, micro: int = 0) -> MicroBatch:
    path, targets = Path(torch.ones(2, WIDTH), (2,)), Targets(torch.tensor([1]), (1,))
    return MicroBatch(StepKey(round_index, micro), path, None, targets)


def opened(
    round_index: int = 0, micro: int = 0, continues: bool = False, heartbeat_seconds: float = 60
) -> Response:
    return Response(
        opened=training_pb2.SessionOpened(
            next=training_pb2.Position(round=round_index, micro=micro),
            course=training_pb2.COURSE_CONTINUE if continues else training_pb2.COURSE_GO_BACK,
            heartbeat_seconds=heartbeat_seconds,
        )
    )


def heartbeat(waiting_for: str = "") -> Response:
    return Response(heartbeat=heartbeat_pb2.Heartbeat(waiting_for=waiting_for))


def answer(key: StepKey, loss: float = 0.0, checkpoint: bool = False) -> Iterator[Response]:
    """The result of a micro-batch, whose `loss` may tell it from another one of the same key."""
    gradient = torch.full((2, WIDTH), float(key.round))
    result = StepResult(key, gradient, None, loss, 0.0, None, checkpoint)
    header, data = result_to_message(result, "raw")
    yield Response(step=header)
    for chunk in bundle_chunks(data):
        yield Response(chunk=chunk)


class Call:
    """One stream as its script sees it."""

    def __init__(
        self, requests: Iterator[training_pb2.TrainRequest], context: grpc.ServicerContext
    ) -> None:
        self._requests = requests
        self.context = context
        self.opening = next(requests).open
        self.heartbeats = 0
        self.left: str | None = None
        self._over = threading.Event()
        context.add_callback(self._over.set)

    def key(self) -> StepKey:
        """Reads the next micro-batch; returns its key."""
        header = self._next("micro_batch").micro_batch
        reader = BundleReader(header.bundle, 1 << 20)
        while not reader.complete:
            reader.add(next(self._requests).chunk)
        return StepKey(header.round, header.micro)

    def held_out(self) -> int:
        """Reads the next held-out request; returns its number of samples."""
        header = self._next("held_out").held_out
        reader = BundleReader(header.bundle, 1 << 20)
        while not reader.complete:
            reader.add(next(self._requests).chunk)
        return len(header.target_lengths)

    def until_leave(self) -> None:
        """Reads to the end of the stream."""
        self.left = self._next("leave").leave.reason
        assert next(self._requests, None) is None

    def fall_silent(self) -> None:
        """Say nothing until the client has given the stream up."""
        assert self._over.wait(SECONDS), "the client never gave up"

    def fail(self, error: LesftError) -> None:
        details = (("grpc-status-details-bin", status_details(error, str(error))),)
        self.context.set_trailing_metadata(details)
        self.context.abort(status_of(error).grpc, str(error))

    def _next(self, kind: str) -> training_pb2.TrainRequest:
        for message in self._requests:
            if message.WhichOneof("message") == kind:
                return message
            assert message.WhichOneof("message") == "heartbeat", message
            self.heartbeats += 1
        raise AssertionError(f"the client ended the stream where {kind} was due")


Script = Callable[[Call], Iterator[Response]]


class FakeServer(training_pb2_grpc.TrainingServiceServicer):
    """Follows one script per stream; more streams than scripts are an error of the test."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = scripts
        self.calls: list[Call] = []
        self.errors: list[BaseException] = []
        self._finished = threading.Condition()
        self._num_finished = 0

    def Train(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[Response]:
        try:
            call = Call(request_iterator, context)
            self.calls.append(call)
            yield from self._scripts[len(self.calls) - 1](call)
        except (AssertionError, IndexError, RuntimeError, TimeoutError) as error:
            self.errors.append(error)
            raise
        finally:
            with self._finished:
                self._num_finished += 1
                self._finished.notify_all()

    def wait_until_over(self, streams: int, seconds: float = SECONDS) -> None:
        """Returns once so many streams have ended."""
        with self._finished:
            assert self._finished.wait_for(lambda: self._num_finished >= streams, seconds)


@contextmanager
def fake_server(*scripts: Script) -> Iterator[tuple[FakeServer, str]]:
    """Gives the server and its address; afterwards every script must have done what it said."""
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        fake = FakeServer(*scripts)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(fake, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield fake, f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()
    assert fake.errors == []
    assert len(fake.calls) == len(scripts), "not every stream was opened"
