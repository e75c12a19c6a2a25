"""The back over gRPC, for as long as the run lasts: streams come and go, the link stays."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from lesft.errors import LesftError, OutOfOrder, Unreachable
from lesft.micro_batch import MicroBatch, Path, StepKey, StepResult, Targets
from lesft.step_messages import Limits
from lesft.v1 import training_pb2
from lesft.wire import WireCounter
from lesft_client.back import GoBack, Rejoin, Turn
from lesft_client.patience import patiently
from lesft_client.stream import Answer, HeldOutRequest, Request, Stream
from lesft_client.timeline import Moments

log = logging.getLogger(__name__)

_LEAVE_SECONDS = 3
"""How long to wait until the server has read the leave and closed the stream."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a service, in seconds."""

    first_contact: float
    """To go on trying one that has not answered yet."""
    reconnect: float
    """To go on trying one that has answered before."""
    stall: float
    """To hear nothing over an open connection before it is given up for a new one."""


@dataclass(frozen=True)
class _Answered:
    answer: Answer
    moments: Moments | None = None
    """Of the micro-batch that was answered last before or with this."""


class ServerLink:
    """A session that outlives its connections.

    When a stream breaks or falls silent a new one is opened, in a thread of its own, and what was
    not answered is sent again; the training loop only notices that an answer takes longer. Where
    the server has gone back to a checkpoint, or the others have gone on without this client, the
    loop gets a `Turn`. The caller bounds what is in flight: it sends at most one accumulation
    window ahead.
    """

    def __init__(
        self,
        connect: Callable[[], grpc.Channel],
        opening: training_pb2.OpenSession,
        limits: Limits,
        party: str,
        wire: WireCounter,
        patience: Patience,
        checkpoint_rounds: Callable[[], list[int]] = list,
        on_turn: Callable[[], None] = lambda: None,
        on_waiting: Callable[[str], None] = lambda waiting_for: None,
        on_reconnect: Callable[[], None] = lambda: None,
    ) -> None:
        """`opening` holds what stays the same in every opening.

        `on_turn` is called, in a thread of the link, as soon as `check` would raise; `on_waiting`
        with what the run waits for, in words; `on_reconnect` after each connection but the first.
        """
        self._connect = connect
        self._opening = opening
        self._limits = limits
        self._party = party
        self._wire = wire
        self._patience = patience
        self._checkpoint_rounds = checkpoint_rounds
        self._on_turn = on_turn
        self._on_waiting = on_waiting
        self._on_reconnect = on_reconnect
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._unanswered: deque[Request] = deque()
        self._answers: queue.Queue[_Answered | LesftError | Turn] = queue.Queue()
        self._handed_in: dict[StepKey, float] = {}
        self._received = _Answered([])
        self._position: StepKey | None = None
        self._turn: LesftError | Turn | None = None
        self._held: set[int] = set()
        self._leaving = False
        self._heard = 0
        self._keeper = threading.Thread(target=self._keep, name="server link", daemon=True)
        self.reconnects = 0

    def open(self) -> Turn:
        """Open the session; returns where to begin, for `resume`.

        Raises what the server refuses it with, or Unreachable.
        """
        stream = patiently(self._open_stream, self._patience.first_contact)
        self._stream, self._held = stream, set(stream.opened.held)
        self._keeper.start()
        return _turn_of(stream.opened)

    # ------------------------------------------------------------------ the training loop's side

    def resume(self, round_index: int) -> None:
        """See `BackLink`. Raises Turn when the server meanwhile wants another round."""
        with self._lock:
            if isinstance(self._turn, LesftError):
                raise self._turn
            if self._turn is not None and self._turn.round != round_index:
                raise self._turn
            self._turn = None
            self._position = StepKey(round_index, 0)
            self._unanswered.clear()
            self._handed_in.clear()
            self._answers = queue.Queue()

    def holds(self, sample: int) -> bool:
        """See `BackLink`."""
        with self._lock:
            return sample in self._held

    def send(self, batch: MicroBatch) -> None:
        """See `BackLink`."""
        self._send(batch)

    def receive(self) -> StepResult:
        """See `BackLink`. Raises Turn, or what ended the session: RunStopped, Unreachable, ..."""
        answer = self._next_answer()
        assert isinstance(answer, StepResult), "answers come in the order of the requests"
        return answer

    def waited_for(self, seconds: float) -> dict[str, float]:
        """See `BackLink`."""
        received = self._received
        if received.moments is None or not isinstance(received.answer, StepResult):
            return {}
        handed_in = self._handed_in.pop(received.answer.key, received.moments.encoding)
        return received.moments.waited_for(handed_in, seconds)

    def score(self, base: Path, targets: Targets) -> list[float]:
        """See `BackLink`."""
        self._send(HeldOutRequest(base, targets))
        answer = self._next_answer()
        assert isinstance(answer, list), "answers come in the order of the requests"
        return answer

    def check(self) -> None:
        """Raises what `receive` would raise instead of an answer."""
        turn = self._turn
        if turn is not None:
            raise turn

    def leave(self, reason: str) -> None:
        """See `BackLink`. Waits until the server has closed the stream, but not for long."""
        with self._lock:
            self._leaving = True
            stream = self._stream
        if stream is not None:
            stream.leave(reason)
            self._keeper.join(_LEAVE_SECONDS)
            if self._turn is not None:  # the keeper reads no more
                stream.drain(_LEAVE_SECONDS)
        self.close()

    def close(self) -> None:
        """End the session without a word, as a crash would."""
        with self._lock:
            self._leaving = True
            stream = self._stream
        if stream is not None:
            stream.close()

    def _send(self, request: Request) -> None:
        with self._lock:
            self.check()
            self._unanswered.append(request)
            if isinstance(request, MicroBatch):
                self._handed_in[request.key] = time.monotonic()
            if self._stream is not None:
                self._stream.send(request)

    def _next_answer(self) -> Answer:
        answered = self._answers.get()
        if isinstance(answered, Exception):
            self._answers.put(answered)  # for whoever asks again
            raise answered
        self._received = answered
        return answered.answer

    # ------------------------------------------------------------------ the link's own thread

    def _keep(self) -> None:
        """Receive, and open another stream when one breaks, until the session is over."""
        stream = self._stream
        assert stream is not None
        try:
            while True:
                try:
                    self._receive_all(stream)
                    return
                except Unreachable as error:
                    self._drop(stream)
                    log.warning("%s: the connection is lost, opening another one", error)
                stream = self._reopen()
        except LesftError as error:
            if not self._leaving:
                self._turn_to(error, self._stream)
        except Exception:
            log.exception("the link to the %s failed", self._party)
            self._turn_to(
                OutOfOrder(f"{self._party}: the link to it failed; see the log"), self._stream
            )

    def _receive_all(self, stream: Stream) -> None:
        """Returns when the session has ended well. Raises what broke the stream."""

        def asked() -> Request:
            with self._lock:
                if self._unanswered:
                    return self._unanswered[0]
            raise OutOfOrder(f"{self._party}: sent an answer that nobody asked for")

        def on_heartbeat(waiting_for: str) -> None:
            if self._unanswered:  # else the loop is busy, or waits for somebody else
                self._on_waiting(waiting_for)

        while (answer := stream.receive(asked, on_heartbeat)) is not None:
            self._heard += 1
            self._on_waiting("")
            with self._lock:
                if self._turn is not None or not self._unanswered:
                    continue  # of a course that was given up
                request = self._unanswered.popleft()
                if isinstance(request, MicroBatch):
                    accumulation = self._limits.spec.accumulation
                    self._position = request.key.following(accumulation)
                if isinstance(answer, StepResult):
                    self._held.update(answer.held)
                self._answers.put(_Answered(answer, stream.moments))
        if not self._leaving:
            raise Unreachable(f"{self._party}: closed the stream")

    def _drop(self, stream: Stream) -> None:
        with self._lock:
            self._stream = None
        stream.close()
        self._check_wanted()
        self._on_waiting(f"{self._party} to answer again")

    def _reopen(self) -> Stream:
        stream = self._open_again()
        if stream.opened.course == training_pb2.COURSE_CONTINUE and not self._can_repeat(stream):
            log.warning("%s: has lost activations, which a checkpoint brings back", self._party)
            stream.close()
            with self._lock:
                self._position = None
            stream = self._open_again()
        with self._lock:
            self._held = set(stream.opened.held)
        self.reconnects += 1
        self._on_reconnect()
        self._on_waiting("")
        if stream.opened.course == training_pb2.COURSE_CONTINUE:
            with self._lock:
                self._stream = stream
                for request in self._unanswered:
                    stream.send(request)
            log.warning("%s: connected again", self._party)
        else:
            turn = _turn_of(stream.opened)
            self._turn_to(turn, stream)
            log.warning("%s: connected again, %s", self._party, turn)
        if self._leaving:
            stream.close()
            self._check_wanted()
        return stream

    def _open_again(self) -> Stream:
        return patiently(
            self._open_stream,
            self._patience.reconnect,
            self._check_wanted,
            progress=lambda: self._heard,
            option="--reconnect-seconds",
        )

    def _can_repeat(self, stream: Stream) -> bool:
        """Whether what was not answered can be sent again as it was, and is whole there."""
        held = set(stream.opened.held)
        with self._lock:
            return all(
                held.union(request.enclosed).issuperset(request.samples)
                for request in self._unanswered
                if isinstance(request, MicroBatch)
            )

    def _open_stream(self) -> Stream:
        opening = training_pb2.OpenSession()
        opening.CopyFrom(self._opening)
        opening.checkpoint_rounds.extend(self._checkpoint_rounds())
        with self._lock:
            # One that is about to go back stands nowhere.
            if self._turn is None and self._position is not None:
                opening.position.round = self._position.round
                opening.position.micro = self._position.micro
        return Stream(
            self._connect(), opening, self._limits, self._party, self._wire, self._patience.stall
        )

    def _check_wanted(self) -> None:
        if self._leaving:
            raise Unreachable(f"{self._party}: the client has left")

    def _turn_to(self, turn: LesftError | Turn, stream: Stream | None) -> None:
        """From now on every call raises `turn`; nothing of the old course gets into `stream`."""
        with self._lock:
            self._stream = stream
            self._turn = turn
            self._unanswered.clear()
            self._answers.put(turn)
        self._on_turn()


def _turn_of(opened: training_pb2.SessionOpened) -> Turn:
    kind = Rejoin if opened.course == training_pb2.COURSE_REJOIN else GoBack
    return kind(opened.next.round)
