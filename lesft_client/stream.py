"""One training stream: encoding and decoding in threads of their own, heartbeats, and its end."""

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import grpc

from lesft.bundle import BundleReader, bundle_chunks
from lesft.errors import BundleError, LesftError, OutOfOrder, Unreachable, one_line
from lesft.interceptors import error_from
from lesft.micro_batch import MicroBatch, Path, StepResult, Targets
from lesft.step_messages import (
    Limits,
    held_out_to_message,
    micro_batch_to_message,
    result_from_message,
)
from lesft.v1 import heartbeat_pb2, training_pb2, training_pb2_grpc
from lesft.wire import Kind, WireCounter, bundle_parts, tensor_bytes
from lesft_client.timeline import Moments
from lesft_client.watchdog import Watchdog

_OPENING_SECONDS = 0.1
"""How often to look whether the server has said by now how often it wants a heartbeat."""


@dataclass(frozen=True)
class HeldOutRequest:
    """Held-out samples to be scored."""

    base: Path
    targets: Targets


Request = MicroBatch | HeldOutRequest
Answer = StepResult | list[float]


class Stream:
    """One call of Train on a connection of its own, from its opening to its end.

    `send` and `leave` may be called from any thread and never wait; one thread receives.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        opening: training_pb2.OpenSession,
        limits: Limits,
        party: str,
        wire: WireCounter,
        stall_seconds: float,
    ) -> None:
        """Open the session; closes `channel` when it is over.

        Raises what the server refuses the opening with, Unreachable when it does not answer.
        """
        self._channel = channel
        self._limits = limits
        self._party = party
        self._wire = wire
        self._heartbeat_seconds: float | None = None
        self._outgoing: queue.Queue[training_pb2.TrainRequest | Request | None] = queue.Queue()
        self._outgoing.put(training_pb2.TrainRequest(open=opening))
        self._responses = training_pb2_grpc.TrainingServiceStub(channel).Train(self._requests())
        self._watchdog = Watchdog(stall_seconds, self._responses.cancel)
        self._encoding: deque[tuple[float, float]] = deque()
        """When each micro-batch that was not answered yet began and ended to be encoded."""
        self.moments: Moments | None = None
        """Of the micro-batch that was answered last."""
        try:
            self.opened = self._read_opened()
        except BaseException:
            self.close()
            raise
        self._heartbeat_seconds = max(self.opened.heartbeat_seconds, _OPENING_SECONDS)
        # A server whose heartbeats are rarer than our patience is not to be taken for dead.
        self._watchdog.seconds = max(stall_seconds, 3 * self._heartbeat_seconds)

    # ------------------------------------------------------------------ sending

    def send(self, request: Request) -> None:
        """Send a request after those before it."""
        self._outgoing.put(request)

    def leave(self, reason: str) -> None:
        """Send the last message."""
        leave = training_pb2.Leave(reason=reason)
        self._outgoing.put(training_pb2.TrainRequest(leave=leave))
        self._outgoing.put(None)

    def close(self) -> None:
        """End the call and its connection, whatever is under way."""
        self._watchdog.stop()
        self._outgoing.put(None)
        self._responses.cancel()
        self._channel.close()

    def _requests(self) -> Iterator[training_pb2.TrainRequest]:
        """Runs in gRPC's own thread, which takes as much as the server reads."""
        held_out_index = 0
        while True:
            try:
                item = self._outgoing.get(timeout=self._heartbeat_seconds or _OPENING_SECONDS)
            except queue.Empty:
                if self._heartbeat_seconds is None:
                    continue
                item = training_pb2.TrainRequest(heartbeat=heartbeat_pb2.Heartbeat())
            if item is None:
                return
            if isinstance(item, training_pb2.TrainRequest):
                self._wire.add("up", "other", item.ByteSize())
                yield item
                continue
            spec, began = self._limits.spec, time.monotonic()
            if isinstance(item, MicroBatch):
                micro_batch, data = micro_batch_to_message(item, spec.activation_encoding)
                request = training_pb2.TrainRequest(micro_batch=micro_batch)
                parts: dict[Kind, int] = bundle_parts(data)
            else:
                held_out, data = held_out_to_message(
                    held_out_index, item.base, item.targets, spec.inference_encoding
                )
                held_out_index += 1
                request = training_pb2.TrainRequest(held_out=held_out)
                parts = {}
            chunks = [training_pb2.TrainRequest(chunk=chunk) for chunk in bundle_chunks(data)]
            size = request.ByteSize() + sum(chunk.ByteSize() for chunk in chunks)
            self._wire.add_message("up", size, parts)
            if isinstance(item, MicroBatch):
                self._encoding.append((began, time.monotonic()))
            yield request
            yield from chunks

    def drain(self, seconds: float) -> None:
        """Wait until the server has closed the stream, but not for long."""
        with Watchdog(seconds, self._responses.cancel), suppress(LesftError):
            while self._next() is not None:
                pass

    # ------------------------------------------------------------------ receiving

    def receive(
        self, asked: Callable[[], Request], on_heartbeat: Callable[[str], None]
    ) -> Answer | None:
        """The next answer; None when the server has closed the stream well.

        `asked` gives the request that it answers, and `on_heartbeat` hears what the server waits
        for. Raises what ended the session, Unreachable when nothing was heard for too long.
        """
        while (response := self._next()) is not None:
            kind = response.WhichOneof("message")
            if kind != "heartbeat":
                return self._read_answer(response, asked())
            self._wire.add("down", "other", response.ByteSize())
            on_heartbeat(one_line(response.heartbeat.waiting_for))
        return None

    def _next(self) -> training_pb2.TrainResponse | None:
        try:
            response = next(self._responses, None)
        except grpc.RpcError as error:
            raise self._error(error) from None
        self._watchdog.feed()
        return response

    def _error(self, error: grpc.RpcError) -> LesftError:
        if self._watchdog.bitten:
            seconds = self._watchdog.seconds
            return Unreachable(f"{self._party}: nothing was heard of it for {seconds:g} s")
        return error_from(error, self._party)

    def _read_opened(self) -> training_pb2.SessionOpened:
        response = self._next()
        if response is None or response.WhichOneof("message") != "opened":
            raise OutOfOrder(f"{self._party}: did not answer the opening; is it a LESFT server?")
        self._wire.add("down", "other", response.ByteSize())
        return response.opened

    def _read_answer(self, response: training_pb2.TrainResponse, asked: Request) -> Answer:
        kind = response.WhichOneof("message")
        if isinstance(asked, HeldOutRequest) and kind == "held_out":
            self._wire.add("down", "other", response.ByteSize())
            return list(response.held_out.nll_sums)
        if isinstance(asked, MicroBatch) and kind == "step":
            header, data, size = time.monotonic(), b"", 0
            if self._limits.spec.train_front:
                most = self._limits.result_bytes(asked)
                data, size = self._read_bundle(response.step, most)
            whole = time.monotonic()
            result = result_from_message(response.step, data, asked, self._limits)
            parts: dict[Kind, int] = {"gradients": tensor_bytes(data)}
            self._wire.add_message("down", size + response.ByteSize(), parts)
            began, ended = self._encoding.popleft()
            self.moments = Moments(
                began, ended, header, whole, time.monotonic(), response.step.times
            )
            return result
        raise OutOfOrder(f"{self._party}: sent {kind} where another answer was due")

    def _read_bundle(self, header: training_pb2.StepResult, max_bytes: int) -> tuple[bytes, int]:
        reader = BundleReader(header.bundle, max_bytes)
        size = 0
        while not reader.complete:
            response = self._next()
            if response is None or response.WhichOneof("message") != "chunk":
                raise BundleError(f"{self._party}: chunk {reader.next_index} is missing")
            reader.add(response.chunk)
            size += response.ByteSize()
        return reader.data(), size
