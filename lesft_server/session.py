"""One client's stream: what it may send when, and the answers in the order of the requests."""

import asyncio
import enum
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Coroutine
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

_NO_LEAVE = "its stream ended without leave (was it stopped, or its connection cut?)"

T = TypeVar("T")
_Requests = AsyncIterator[training_pb2.TrainRequest]
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
        self._outbox: asyncio.Queue[tuple[str, asyncio.Task[_Answer]]] = asyncio.Queue()
        self._unanswered: Counter[str] = Counter()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.state = SessionState.OPEN
        self.member = engine.run.join(client_id, num_samples, self.fail)

    # ------------------------------------------------------------------ requests

    async def receive(self, requests: _Requests) -> None:
        """Read the stream until the session ends; whatever breaks a rule ends it."""
        try:
            while self.state is SessionState.OPEN:
                await self._receive_one(requests)
        except Exception as error:
            self.fail(error)

    async def _receive_one(self, requests: _Requests) -> None:
        request = await _next(requests)
        self.member.last_seen = time.time()
        kind = request.WhichOneof("message")
        if kind == "micro_batch":
            await self._receive_micro_batch(request.micro_batch, requests)
        elif kind == "held_out":
            await self._receive_held_out(request.held_out, requests)
        elif kind == "leave":
            self._close(SessionState.LEFT, request.leave.reason)
        else:
            raise OutOfOrder(
                f"{kind or 'an empty message'} came where a micro_batch, held_out or leave was due"
            )

    async def _receive_micro_batch(
        self, header: training_pb2.MicroBatch, requests: _Requests
    ) -> None:
        key, due = StepKey(header.round, header.micro), self.member.next_key
        if key != due:
            raise OutOfOrder(f"{due} is due, got {key}: each must come once and in order")
        if key.round == self._engine.run.spec.rounds:
            raise OutOfOrder(f"{key}: the run has only {key.round} rounds")
        if key.micro == 0 and self._unanswered["micro_batch"]:
            raise OutOfOrder(f"{key} came before the round before it was answered")
        check_lengths(header, self._engine.limits)
        data = await self._receive_bundle(header, requests)
        batch = await asyncio.to_thread(micro_batch_from_message, header, data, self._engine.limits)
        self.member.next_key = key.following(self._engine.run.spec.accumulation)
        self._answer_with("micro_batch", self._train(batch))

    async def _receive_held_out(self, header: training_pb2.HeldOut, requests: _Requests) -> None:
        if self._unanswered["held_out"] == MAX_HELD_OUT_WAITING:
            raise OutOfOrder(f"at most {MAX_HELD_OUT_WAITING} held_out requests may be unanswered")
        check_lengths(header, self._engine.limits)
        data = await self._receive_bundle(header, requests)
        base, targets = await asyncio.to_thread(
            held_out_from_message, header, data, self._engine.limits
        )
        self._answer_with("held_out", self._score(header.index, base, targets))

    async def _receive_bundle(
        self, header: training_pb2.MicroBatch | training_pb2.HeldOut, requests: _Requests
    ) -> bytes:
        reader = BundleReader(header.bundle, self._engine.limits.bundle_bytes(header))
        while not reader.complete:
            request = await _next(requests)
            kind = request.WhichOneof("message")
            if kind != "chunk":
                raise BundleError(
                    f"chunk {reader.next_index} of a bundle is missing: "
                    f"{kind or 'an empty message'} came"
                )
            reader.add(request.chunk)
        return await asyncio.to_thread(reader.data)

    # ------------------------------------------------------------------ answers

    def _answer_with(self, kind: str, answer: Coroutine[Any, Any, _Answer]) -> None:
        """Queue an answer that is yet to be computed, unless the session ended meanwhile."""
        if self.state is not SessionState.OPEN:
            answer.close()
            return
        self._unanswered[kind] += 1
        self._outbox.put_nowait((kind, asyncio.create_task(answer)))

    async def answers(self) -> AsyncIterator[training_pb2.TrainResponse]:
        """The answers in the order of the requests, until the client leaves.

        Raises what ended the session or the run, as soon as it is known.
        """
        try:
            while (answer := await self._unless_ended(self._next_answer())) is not None:
                header, data = answer
                yield header
                for chunk in bundle_chunks(data):
                    yield training_pb2.TrainResponse(chunk=chunk)
        except Exception as error:
            self.fail(error)
            raise

    async def _next_answer(self) -> _Answer:
        """The oldest answer that was not taken yet.

        A request counts as unanswered until its answer is being sent, so a client that does not
        read cannot make the server hold more answers than the limits on requests allow.
        """
        kind, answer = await self._outbox.get()
        header, data = await answer
        self._unanswered[kind] -= 1
        return header, data

    async def _train(self, batch: MicroBatch) -> _Answer:
        result = await self._engine.cohort.take(self.member.client_id, batch)
        header, data = await asyncio.to_thread(
            result_to_message, result, self._engine.limits.spec.gradient_encoding
        )
        return training_pb2.TrainResponse(step=header), data

    async def _score(self, index: int, base: Path, targets: Targets) -> _Answer:
        sums = await self._engine.device.run(lambda: self._engine.back.score(base, targets))
        result = training_pb2.HeldOutResult(index=index, nll_sums=sums)
        return training_pb2.TrainResponse(held_out=result), b""

    async def _unless_ended(self, wanted: Awaitable[T]) -> T | None:
        """What is wanted, or None when the client has left; raises what else ended the session."""
        task = asyncio.ensure_future(wanted)
        try:
            waited: set[asyncio.Future[Any]] = {task, self._end}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            return self._end.result() if self._end.done() else task.result()
        finally:
            task.cancel()

    # ------------------------------------------------------------------ end

    def fail(self, error: Exception) -> None:
        """End the session with an error; its call ends with that error's status."""
        known = isinstance(error, LesftError)
        reason = str(error) if known else "its call failed on the server; the log has the details"
        self._close(SessionState.LOST, reason, error)

    def close(self) -> None:
        """The call is over, for whatever reason; does nothing after a leave or a failure."""
        self.fail(OutOfOrder(_NO_LEAVE))

    def _close(self, state: SessionState, reason: str, error: Exception | None = None) -> None:
        """Drop what was not answered yet and give up the place in the run; the first end counts."""
        if state not in SESSION_MOVES[self.state]:
            return
        self.state = state
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)
            self._end.exception()  # nobody need be waiting for it
        while not self._outbox.empty():
            _, answer = self._outbox.get_nowait()
            answer.cancel()
        self._engine.cohort.withdraw(self.member.client_id)
        self._engine.run.leave(self.member, reason)


async def _next(requests: _Requests) -> training_pb2.TrainRequest:
    request = await anext(requests, None)
    if request is None:
        raise OutOfOrder(_NO_LEAVE)
    return request
