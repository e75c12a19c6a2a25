"""One client's stream: what it may send when, and the answers in the order of the requests."""

import asyncio
import enum
import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from lesft.back import Back
from lesft.bundle import BundleReader, bundle_chunks, check_announced
from lesft.device_thread import DeviceThread
from lesft.errors import BundleError, LesftError, OutOfOrder, Unreachable
from lesft.intake import Intake
from lesft.logs import note
from lesft.micro_batch import MicroBatch, Path, StepKey, Targets
from lesft.norms import ActivationNorms
from lesft.step_messages import (
    Limits,
    check_lengths,
    check_samples,
    held_out_from_message,
    micro_batch_from_message,
)
from lesft.v1 import heartbeat_pb2, training_pb2
from lesft.wire import Kind, bundle_parts, chunk_messages_bytes, tensor_bytes
from lesft_server.cohort import Cohort, Request
from lesft_server.device_account import DeviceAccount
from lesft_server.handshake import resume_point
from lesft_server.journal import Journal
from lesft_server.pauses import Pauses
from lesft_server.run import Run, RunState
from lesft_server.sample_store import SampleStore
from lesft_server.step_clock import StepClock

MAX_HELD_OUT_WAITING = 8
"""Held-out requests of one session that may wait for their answers at once."""

MAX_HEARTBEATS = 20
"""Heartbeats that a client may send in the time of one, beside late ones: a flood is refused."""

_NO_LEAVE = "its stream ended without leave (was it stopped, or its connection cut?)"

_Requests = AsyncIterator[training_pb2.TrainRequest]
_Answer = tuple[training_pb2.TrainResponse, bytes]
_Read = Callable[[], Awaitable[_Answer]]


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
    journal: Journal
    cohort: Cohort
    samples: SampleStore
    limits: Limits
    clock: StepClock
    account: DeviceAccount
    intake: Intake
    norms: ActivationNorms
    heartbeat_seconds: float
    stall_seconds: float
    pauses: Pauses = field(default_factory=Pauses)
    scoring: asyncio.Lock = field(default_factory=asyncio.Lock)
    """A training step waits for one held-out request at most, however many there are."""


class Session:
    """Lives as long as its stream: `receive` takes requests, `answers` gives what comes of them."""

    def __init__(self, engine: Engine, opening: training_pb2.OpenSession) -> None:
        """`opening` was checked. Raises what `resume_point` and `Run.join` raise."""
        self._engine = engine
        self._outbox: asyncio.Queue[tuple[str, asyncio.Task[_Read]]] = asyncio.Queue()
        self._unanswered: Counter[str] = Counter()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sending_since: float | None = None
        self._heartbeats: list[float] = []
        self._handed_in = False
        self.state = SessionState.OPEN
        run, cohort, client_id = engine.run, engine.cohort, opening.client_id
        run.check_join(client_id, opening.num_samples, opening.instance_id)
        self.resumes_at = resume_point(
            opening,
            lambda key: cohort.can_go_on_at(client_id, key),
            engine.journal.ledger.first_round,
            cohort.next_key,
            cohort.rejoins_at,
        )
        if self.resumes_at.course != training_pb2.COURSE_CONTINUE:
            cohort.withdraw(client_id)
        if self.resumes_at.course == training_pb2.COURSE_REJOIN:
            cohort.goes_on_without(client_id, self.resumes_at.key.round)
        self._next_key = self.resumes_at.key
        self._tell = self.fail  # one object, by which the run tells this session from a later one
        cohort.welcome(client_id)
        self.member = run.join(client_id, opening.num_samples, opening.instance_id, self._tell)
        self.member.next_key = self._next_key
        self._wire = self.member.wire
        self._wire.add("up", "other", training_pb2.TrainRequest(open=opening).ByteSize())
        self._kept = engine.samples.of(client_id, opening.instance_id)
        self._remembered = engine.back.memory.of(client_id, opening.instance_id)

    @property
    def held(self) -> list[int]:
        """The client's samples of which it need not send again what lasts, as it goes on."""
        if self._engine.run.spec.train_front:
            return self._remembered.numbers_before(self.resumes_at.key)
        return self._kept.numbers

    # ------------------------------------------------------------------ requests

    async def receive(self, requests: _Requests) -> None:
        """Read the stream until the session ends; whatever breaks a rule ends it."""
        note(client=self.member.client_id)
        try:
            while self.state is SessionState.OPEN:
                await self._receive_one(requests)
        except Exception as error:
            self.fail(error)

    async def _receive_one(self, requests: _Requests) -> None:
        request = await self._next(requests)
        kind = request.WhichOneof("message")
        if kind != "micro_batch":
            self._wire.add("up", "other", request.ByteSize())
        if kind == "micro_batch":
            await self._receive_micro_batch(request.micro_batch, requests)
        elif kind == "held_out":
            await self._receive_held_out(request.held_out, requests)
        elif kind == "heartbeat":
            self._receive_heartbeat()
        elif kind == "leave":
            self._close(SessionState.LEFT, request.leave.reason)
        else:
            raise OutOfOrder(
                f"{kind or 'an empty message'} came where a micro_batch, held_out or leave was due"
            )

    async def _receive_micro_batch(
        self, header: training_pb2.MicroBatch, requests: _Requests
    ) -> None:
        announced = time.monotonic()
        key, due = StepKey(header.round, header.micro), self._next_key
        if key != due:
            raise OutOfOrder(f"{due} is due, got {key}: each must come once and in order")
        if key.round == self._engine.run.spec.rounds:
            raise OutOfOrder(f"{key}: the run has only {key.round} rounds")
        if key.micro == 0 and self._unanswered["micro_batch"]:
            raise OutOfOrder(f"{key} came before the round before it was answered")
        spec = self._engine.run.spec
        check_samples(header, spec, self.member.num_samples)
        held = self._remembered if spec.train_front else self._kept
        held.check_complete(header.samples, header.enclosed)
        data = b""
        if spec.train_front or header.enclosed:
            check_lengths(header, self._engine.limits)
            data = await self._receive_bundle(header, requests)
        times = training_pb2.StepTimes(receive=time.monotonic() - announced)
        decoding = time.monotonic()
        request = await asyncio.to_thread(self._read_request, header, data)
        times.decode = time.monotonic() - decoding
        self._handed_in = True
        self._engine.pauses.handed_in(self.member.client_id)
        if self.state is SessionState.OPEN:
            self._next_key = key.following(spec.accumulation)
            self.member.next_key = self._next_key
        self._answer_with("micro_batch", self._train(request, times))

    def _read_request(self, header: training_pb2.MicroBatch, data: bytes) -> Request:
        """Runs in a thread of its own."""
        engine, parts = self._engine, dict[Kind, int]()
        with engine.clock.phase("decode", header.round, client=self.member.client_id):
            try:
                batch = micro_batch_from_message(header, data, engine.limits, engine.norms.admit)
                parts = bundle_parts(data)
            finally:
                size = training_pb2.TrainRequest(micro_batch=header).ByteSize()
                self._wire.add_message("up", size + chunk_messages_bytes(len(data)), parts)
            if not engine.run.spec.train_front:
                return Request(*self._kept.complete(batch))
            digest = hashlib.sha256(header.SerializeToString(deterministic=True))
            digest.update(data)
            if not engine.run.spec.names_samples:
                return Request(batch, digest.digest())
            remembered = self._remembered
            return Request(remembered.complete(batch), digest.digest(), remembered)

    async def _receive_held_out(self, header: training_pb2.HeldOut, requests: _Requests) -> None:
        if self._unanswered["held_out"] == MAX_HELD_OUT_WAITING:
            raise OutOfOrder(f"at most {MAX_HELD_OUT_WAITING} held_out requests may be unanswered")
        check_lengths(header, self._engine.limits)
        data = await self._receive_bundle(header, requests)
        self._wire.add("up", "other", chunk_messages_bytes(len(data)))
        base, targets = await asyncio.to_thread(
            held_out_from_message, header, data, self._engine.limits, self._engine.norms.admit
        )
        self._answer_with("held_out", self._score(header.index, base, targets))

    async def _receive_bundle(
        self, header: training_pb2.MicroBatch | training_pb2.HeldOut, requests: _Requests
    ) -> bytes:
        most = self._engine.limits.bundle_bytes(header)
        check_announced(header.bundle, most)
        async with self._engine.intake.room(header.bundle.total_bytes):
            return await self._receive_chunks(BundleReader(header.bundle, most), requests)

    async def _receive_chunks(self, reader: BundleReader, requests: _Requests) -> bytes:
        while not reader.complete:
            request = await self._next(requests)
            kind = request.WhichOneof("message")
            if kind != "chunk":
                raise BundleError(
                    f"chunk {reader.next_index} of a bundle is missing: "
                    f"{kind or 'an empty message'} came"
                )
            reader.add(request.chunk)
        return await asyncio.to_thread(reader.data)

    def _receive_heartbeat(self) -> None:
        now, interval = time.monotonic(), self._engine.heartbeat_seconds
        self._heartbeats = [t for t in self._heartbeats if t > now - interval] + [now]
        # After a cut that the connection has outlived, those of the meantime come all at once.
        most = MAX_HEARTBEATS + int(2 * self._engine.stall_seconds / interval)
        if len(self._heartbeats) > most:
            raise OutOfOrder(
                f"at most {most} heartbeats may come within {interval:g} s: one is enough"
            )

    async def _next(self, requests: _Requests) -> training_pb2.TrainRequest:
        """The client's next message. Raises when it stalls: sends nothing, or reads nothing."""
        seconds = self._engine.stall_seconds
        try:
            request = await asyncio.wait_for(anext(requests, None), seconds)
        except asyncio.TimeoutError:
            raise Unreachable(f"nothing was heard of it for {seconds:g} s") from None
        if request is None:
            raise OutOfOrder(_NO_LEAVE)
        self.member.last_seen = time.time()
        since = self._sending_since
        if since is not None and time.monotonic() - since > seconds:
            raise Unreachable(f"it has read nothing for {seconds:g} s")
        return request

    # ------------------------------------------------------------------ answers

    def _answer_with(self, kind: str, answer: Coroutine[Any, Any, _Read]) -> None:
        """Queue an answer that is yet to be computed, unless the session ended meanwhile."""
        if self.state is not SessionState.OPEN:
            answer.close()
            return
        self._unanswered[kind] += 1
        self._outbox.put_nowait((kind, asyncio.create_task(answer)))

    async def answers(self) -> AsyncIterator[training_pb2.TrainResponse]:
        """The answers in the order of the requests, until the client leaves; heartbeats between.

        Raises what ended the session or the run, as soon as it is known.
        """
        try:
            while True:
                async with aclosing(self._next_answer()) as responses:
                    async for response in responses:
                        self._sending_since = time.monotonic()
                        yield response
                        self._sending_since = None
                if self._end.done():
                    self._end.result()
                    return
        except Exception as error:
            self.fail(error)
            raise

    async def _next_answer(self) -> AsyncGenerator[training_pb2.TrainResponse, None]:
        """The oldest answer that was not taken yet; heartbeats while there is none.

        A request counts as unanswered until its answer is being sent, and a gradient is read from
        the ledger only then: a client that does not read cannot make the server hold much.
        """
        waiting = asyncio.create_task(self._take_answer())
        try:
            while not waiting.done():
                waited: set[asyncio.Future[Any]] = {waiting, self._end}
                await asyncio.wait(
                    waited,
                    timeout=self._engine.heartbeat_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if self._end.done():
                    self._end.result()
                    return
                if not waiting.done():
                    heartbeat = self._heartbeat()
                    self._wire.add("down", "other", heartbeat.ByteSize())
                    yield heartbeat
            header, data = waiting.result()
        finally:
            waiting.cancel()
        started = time.monotonic()
        yield header
        for chunk in bundle_chunks(data):
            yield training_pb2.TrainResponse(chunk=chunk)
        self._count_answer(header, data, started)

    def _count_answer(
        self, header: training_pb2.TrainResponse, data: bytes, started: float
    ) -> None:
        """Note an answer that was sent whole."""
        size = header.ByteSize() + chunk_messages_bytes(len(data))
        self._wire.add_message("down", size, {"gradients": tensor_bytes(data)})
        if header.WhichOneof("message") == "step":
            name = self.member.client_id
            self._engine.clock.since("send", header.step.round, started, client=name)

    async def _take_answer(self) -> _Answer:
        kind, answer = await self._outbox.get()
        read = await answer
        header, data = await read()
        self._unanswered[kind] -= 1
        return header, data

    def _heartbeat(self) -> training_pb2.TrainResponse:
        run, name = self._engine.run, self.member.client_id
        waits = run.state is RunState.WAITING or self._unanswered["micro_batch"] > 0
        due = [other for other in self._engine.cohort.due() if other != name]
        heartbeat = heartbeat_pb2.Heartbeat(waiting_for=run.waiting_for(due) if waits else "")
        return training_pb2.TrainResponse(heartbeat=heartbeat)

    async def _train(self, request: Request, times: training_pb2.StepTimes) -> _Read:
        client_id, key = self.member.client_id, request.batch.key
        handed_in = time.monotonic()
        step = await self._engine.cohort.take(client_id, request)
        kept = time.monotonic()
        if step is not None:  # a part that came twice may have come after the step began
            times.queue = max(0.0, step.began - handed_in)
            times.back = step.ended - max(step.began, handed_in)
            times.answer = kept - step.ended

        async def read() -> _Answer:
            times.send = time.monotonic() - kept
            ledger = self._engine.journal.ledger
            header, data = await asyncio.to_thread(ledger.read, client_id, key)
            header.held.extend(self._held_after(request.batch))
            header.times.CopyFrom(times)
            return training_pb2.TrainResponse(step=header), data

        return read

    def _held_after(self, batch: MicroBatch) -> list[int]:
        if self._engine.run.spec.train_front:
            return self._remembered.among(batch.samples, batch.key)
        # As it is now: the ledger's answer may be older than what is kept.
        return self._kept.among(batch.samples)

    async def _score(self, index: int, base: Path, targets: Targets) -> _Read:
        async with self._engine.scoring:
            sums = await self._engine.device.run(lambda: self._engine.back.score(base, targets))

        async def read() -> _Answer:
            result = training_pb2.HeldOutResult(index=index, nll_sums=sums)
            return training_pb2.TrainResponse(held_out=result), b""

        return read

    # ------------------------------------------------------------------ end

    def fail(self, error: Exception) -> None:
        """End the session with an error; its call ends with that error's status."""
        known = isinstance(error, LesftError)
        reason = str(error) if known else "its call failed on the server; the log has the details"
        self._close(SessionState.LOST, reason, error)

    def on_end(self, tell: Callable[[], object]) -> None:
        """Call `tell` once the session has ended."""
        self._end.add_done_callback(lambda _: tell())

    def close(self, error: LesftError | None = None) -> None:
        """The call is over, for this reason if any; does nothing after a leave or a failure."""
        self.fail(error or OutOfOrder(_NO_LEAVE))

    def _close(self, state: SessionState, reason: str, error: Exception | None = None) -> None:
        """Drop what was not answered yet and tell the run; the first end counts."""
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
        if self._engine.run.state is RunState.WAITING:
            self._engine.cohort.withdraw(self.member.client_id)
        if self._engine.run.state is RunState.FINISHED and state is SessionState.LEFT:
            self._kept.drop()
            self._remembered.drop()
        if not self._handed_in:
            self._engine.cohort.came_in_vain(self.member.client_id)
            self._engine.pauses.came_in_vain(self.member.client_id)
        self._engine.run.leave(self.member, self._tell, reason, left=error is None)
