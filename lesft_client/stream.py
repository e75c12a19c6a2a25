"""The back over gRPC: one bidirectional stream; encoding and decoding in threads of their own."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from lesft.bundle import BundleReader, bundle_chunks
from lesft.errors import BundleError, LesftError, OutOfOrder, Unreachable
from lesft.interceptors import remote_errors
from lesft.micro_batch import MicroBatch, Path, StepResult, Targets
from lesft.spec import RunSpec
from lesft.spec_messages import spec_from_message
from lesft.step_messages import (
    Limits,
    held_out_to_message,
    micro_batch_to_message,
    result_from_message,
)
from lesft.v1 import training_pb2, training_pb2_grpc
from lesft_client.wire import Kind, WireCounter, encoded_bytes

_LEAVE_SECONDS = 3
"""How long to wait until the server has read the leave and closed the stream."""
_BROKEN_OFF = "the connection broke off in mid-run; look at the server's log, then start again"


@dataclass(frozen=True)
class _HeldOut:
    base: Path
    targets: Targets


_Outgoing = training_pb2.TrainRequest | MicroBatch | _HeldOut
_Answer = StepResult | list[float]


class ServerStream:
    """An open session. `send` never waits for the network, `receive` does.

    The caller bounds what is in flight: it sends at most one accumulation window ahead.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        opening: training_pb2.OpenSession,
        limits: Limits,
        party: str,
        wire: WireCounter,
        on_end: Callable[[LesftError], None] = lambda error: None,
    ) -> None:
        """Open the session. Raises what the server refuses it with, or Unreachable.

        `on_end` is told why the session is over, in a thread of ours, as soon as it is.
        """
        self._limits = limits
        self._party = party
        self._wire = wire
        self._on_end = on_end
        self._outgoing: queue.Queue[_Outgoing | None] = queue.Queue()
        self._unanswered: queue.Queue[MicroBatch | _HeldOut] = queue.Queue()
        self._answers: queue.Queue[_Answer | LesftError] = queue.Queue()
        self._outgoing.put(training_pb2.TrainRequest(open=opening))
        self._responses = training_pb2_grpc.TrainingServiceStub(channel).Train(self._requests())
        self.spec = self._opened()
        self._receiver = threading.Thread(target=self._receive_all, name="receiver", daemon=True)
        self._receiver.start()

    # ------------------------------------------------------------------ the training loop's side

    def send(self, batch: MicroBatch) -> None:
        """See `BackLink`."""
        self._unanswered.put(batch)
        self._outgoing.put(batch)

    def receive(self) -> StepResult:
        """See `BackLink`. Raises what ended the session: RunStopped, Unreachable, ..."""
        answer = self._next_answer()
        assert isinstance(answer, StepResult), "answers come in the order of the requests"
        return answer

    def score(self, base: Path, targets: Targets) -> list[float]:
        """See `BackLink`."""
        held_out = _HeldOut(base, targets)
        self._unanswered.put(held_out)
        self._outgoing.put(held_out)
        answer = self._next_answer()
        assert isinstance(answer, list), "answers come in the order of the requests"
        return answer

    def leave(self, reason: str) -> None:
        """See `BackLink`. Waits until the server has closed the stream, but not for long."""
        leave = training_pb2.Leave(reason=reason)
        self._outgoing.put(training_pb2.TrainRequest(leave=leave))
        self._outgoing.put(None)
        self._receiver.join(_LEAVE_SECONDS)
        self._responses.cancel()

    def _next_answer(self) -> _Answer:
        answer = self._answers.get()
        if isinstance(answer, LesftError):
            raise answer
        return answer

    # ------------------------------------------------------------------ gRPC's sending thread

    def _requests(self) -> Iterator[training_pb2.TrainRequest]:
        held_out_index = 0
        while (item := self._outgoing.get()) is not None:
            if isinstance(item, training_pb2.TrainRequest):
                self._wire.add("up", "other", item.ByteSize())
                yield item
                continue
            encoding = self._limits.spec.activation_encoding
            if isinstance(item, MicroBatch):
                micro_batch, data = micro_batch_to_message(item, encoding)
                request = training_pb2.TrainRequest(micro_batch=micro_batch)
                parts = self._parts(item)
            else:
                held_out, data = held_out_to_message(
                    held_out_index, item.base, item.targets, encoding
                )
                held_out_index += 1
                request = training_pb2.TrainRequest(held_out=held_out)
                parts = {}
            chunks = [training_pb2.TrainRequest(chunk=chunk) for chunk in bundle_chunks(data)]
            size = request.ByteSize() + sum(chunk.ByteSize() for chunk in chunks)
            self._wire.add_message("up", size, parts)
            yield request
            yield from chunks

    def _parts(self, batch: MicroBatch) -> dict[Kind, int]:
        encoding = self._limits.spec.activation_encoding
        parts: dict[Kind, int] = {
            "activations_base": encoded_bytes(batch.base.activations_ND, encoding),
            "labels": 4 * len(batch.targets.ids_T),
        }
        if batch.reference is not None:
            reference_ND = batch.reference.activations_ND
            parts["activations_reference"] = encoded_bytes(reference_ND, encoding)
        return parts

    # ------------------------------------------------------------------ our receiving thread

    def _opened(self) -> RunSpec:
        with remote_errors(self._party):
            response = next(self._responses, None)
        if response is None or response.WhichOneof("message") != "opened":
            raise OutOfOrder(f"{self._party}: did not answer the opening; is it a LESFT server?")
        self._wire.add("down", "other", response.ByteSize())
        return spec_from_message(response.opened.spec)

    def _receive_all(self) -> None:
        end: LesftError = Unreachable(f"{self._party}: {_BROKEN_OFF}")
        try:
            with remote_errors(self._party):
                for response in self._responses:
                    self._answers.put(self._receive(response))
        except Unreachable as error:
            end = Unreachable(f"{error}: {_BROKEN_OFF}")
        except LesftError as error:
            end = error
        finally:
            self._answers.put(end)
            self._on_end(end)

    def _receive(self, response: training_pb2.TrainResponse) -> _Answer:
        asked = self._unanswered.get()
        kind = response.WhichOneof("message")
        if isinstance(asked, _HeldOut) and kind == "held_out":
            self._wire.add("down", "other", response.ByteSize())
            return list(response.held_out.nll_sums)
        if isinstance(asked, MicroBatch) and kind == "step":
            data, size = self._receive_bundle(response.step, self._limits.result_bytes(asked))
            result = result_from_message(response.step, data, asked, self._limits)
            gradients = [result.base_gradient_ND, result.reference_gradient_ND]
            known = sum(g.numel() * g.element_size() for g in gradients if g is not None)
            self._wire.add_message("down", size + response.ByteSize(), {"gradients": known})
            return result
        raise OutOfOrder(f"{self._party}: sent {kind} where another answer was due")

    def _receive_bundle(self, header: training_pb2.StepResult, max_bytes: int) -> tuple[bytes, int]:
        reader = BundleReader(header.bundle, max_bytes)
        size = 0
        while not reader.complete:
            response = next(self._responses, None)
            if response is None or response.WhichOneof("message") != "chunk":
                raise BundleError(f"{self._party}: chunk {reader.next_index} is missing")
            reader.add(response.chunk)
            size += response.ByteSize()
        return reader.data(), size
