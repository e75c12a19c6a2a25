"""One client's stream: what it may send when, and the answers in the order of the requests."""

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from lesft.back import Back
from lesft.bundle import BundleReader, bundle_chunks
from lesft.errors import BundleError, LesftError, OutOfOrder
from lesft.micro_batch import MicroBatch, Path, StepKey, Targets
from lesft.step_messages import (
    Limits,
    check_lengths,
    held_out_from_message,
    micro_batch_from_message,
    result_to_message,
)
from lesft.v1 import training_pb2
from lesft_server.cohort import Cohort
from lesft_server.device_thread import DeviceThread
from lesft_server.run import Run

MAX_HELD_OUT_WAITING = 8
"""Held-out requests of one session that may wait for their answers at once."""

T = TypeVar("T")
_Answer = tuple[training_pb2.TrainResponse, bytes]


class SessionState(enum.Enum):
    """Where a session stands."""

    OPEN = "open"
    LEFT = "left"
    LOST = "lost"


SESSION_MOVES: dict[SessionState, frozenset[SessionState]] = {
    SessionState.OPEN: frozenset({SessionState.LEFT, SessionState.LOST}),
    SessionState.LEFT: frozenset(),
    SessionState.LOST: frozenset(),
}


@dataclass(frozen=True)
class Engine:
    """What all sessions of a server share."""

    run: Run
    back: Back
    device: DeviceThread
    cohort: Cohort
    limits: Limits


class Session:
    """Lives as long as its stream: `receive` takes requests, `answers` gives what comes of them."""

    def __init__(self, engine: Engine, client_id: str, num_samples: int) -> None:
        """Raises what `Run.join` raises."""
        self._engine = engine
        self._outbox: asyncio.Queue[asyncio.Task[_Answer] | None] = asyncio.Queue()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unanswered = 0
        self._held_out = 0
        self.state = SessionState.OPEN
        self.member = engine.run.join(client_id, num_samples, self.fail)

    # ------------------------------------------------------------------ requests

    async def receive(self, requests: AsyncIterator[training_pb2.TrainRequest]) -> None:
        """Read the stream until the client leaves; what breaks a rule ends the session."""
        try:
            while (request := await anext(requests, None)) is not None:
                self.member.last_seen = time.time()
                kind = request.WhichOneof("message")
                if kind == "micro_batch":
                    await self._receive_micro_batch(request.micro_batch, requests)
                elif kind == "held_out":
                    await self._receive_held_out(request.held_out, requests)
                elif kind == "leave":
                    self._close(SessionState.LEFT, request.leave.reason)
                    self._outbox.put_nowait(None)
                    return
                else:
                    raise OutOfOrder(
                        f"{kind or 'an empty message'} came where a micro_batch, held_out or leave "
                        "was due"
                    )
        except LesftError as error:
            self.fail(error)
        else:
            self._outbox.put_nowait(None)

    async def _receive_micro_batch(
        self, header: training_pb2.MicroBatch, requests: AsyncIterator[training_pb2.TrainRequest]
    ) -> None:
        key, due = StepKey(header.round, header.micro), self.member.next_key
        if key != due:
            raise OutOfOrder(f"{due} is due, got {key}: each must come once and in order")
        if key.round == self._engine.run.spec.rounds:
            raise OutOfOrder(f"{key}: the run has only {key.round} rounds")
        if key.micro == 0 and self._unanswered:
            raise OutOfOrder(f"{key} came before the round before it was answered")
        check_lengths(header, self._engine.limits)
        data = await self._receive_bundle(header, requests)
        batch = await asyncio.to_thread(micro_batch_from_message, header, data, self._engine.limits)
        self.member.next_key = key.following(self._engine.run.spec.accumulation)
        self._unanswered += 1
        self._outbox.put_nowait(asyncio.create_task(self._train(batch)))

    async def _receive_held_out(
        self, header: training_pb2.HeldOut, requests: AsyncIterator[training_pb2.TrainRequest]
    ) -> None:
        if self._held_out == MAX_HELD_OUT_WAITING:
            raise OutOfOrder(f"at most {MAX_HELD_OUT_WAITING} held_out requests may be unanswered")
        check_lengths(header, self._engine.limits)
        data = await self._receive_bundle(header, requests)
        base, targets = await asyncio.to_thread(
            held_out_from_message, header, data, self._engine.limits
        )
        self._held_out += 1
        self._outbox.put_nowait(asyncio.create_task(self._score(header.index, base, targets)))

    async def _receive_bundle(
        self,
        header: training_pb2.MicroBatch | training_pb2.HeldOut,
        requests: AsyncIterator[training_pb2.TrainRequest],
    ) -> bytes:
        reader = BundleReader(header.bundle, self._engine.limits.bundle_bytes(header))
        while not reader.complete:
            request = await anext(requests, None)
            kind = request.WhichOneof("message") if request else "the end of the stream"
            if request is None or kind != "chunk":
                raise BundleError(f"chunk {reader.next_index} of a bundle is missing: {kind} came")
            reader.add(request.chunk)
        return await asyncio.to_thread(reader.data)

    # ------------------------------------------------------------------ answers

    async def answers(self) -> AsyncIterator[training_pb2.TrainResponse]:
        """The answers in the order of the requests, until the client leaves.

        Raises what ended the session or the run, as soon as it is known.
        """
        while (answer := await self._unless_ended(self._outbox.get())) is not None:
            header, data = await self._unless_ended(answer)
            yield header
            for chunk in bundle_chunks(data):
                yield training_pb2.TrainResponse(chunk=chunk)

    async def _train(self, batch: MicroBatch) -> _Answer:
        result = await self._engine.cohort.take(self.member.client_id, batch)
        self._unanswered -= 1
        header, data = await asyncio.to_thread(
            result_to_message, result, self._engine.limits.spec.gradient_encoding
        )
        return training_pb2.TrainResponse(step=header), data

    async def _score(self, index: int, base: Path, targets: Targets) -> _Answer:
        sums = await self._engine.device.run(lambda: self._engine.back.score(base, targets))
        self._held_out -= 1
        result = training_pb2.HeldOutResult(index=index, nll_sums=sums)
        return training_pb2.TrainResponse(held_out=result), b""

    async def _unless_ended(self, wanted: Awaitable[T]) -> T:
        task = asyncio.ensure_future(wanted)
        try:
            waited: set[asyncio.Future[Any]] = {task, self._end}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._end.result()
            return await task
        finally:
            task.cancel()

    # ------------------------------------------------------------------ end

    def fail(self, error: LesftError) -> None:
        """End the session with an error; its call ends with that error's status."""
        if not self._end.done():
            self._end.set_exception(error)
            self._end.exception()  # nobody need be waiting for it
        self._close(SessionState.LOST, str(error))

    def close(self) -> None:
        """The stream is gone, whatever the reason; does nothing after a leave or a failure."""
        self._close(SessionState.LOST, "the connection broke off")

    def _close(self, state: SessionState, reason: str) -> None:
        if state in SESSION_MOVES[self.state]:
            self.state = state
            self._engine.run.leave(self.member, reason)
