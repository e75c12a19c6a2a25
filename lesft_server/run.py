"""One run: its state, its members and what came of its rounds."""

import asyncio
import enum
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lesft.errors import (
    AlreadyJoined,
    HandshakeMismatch,
    LesftError,
    NotFound,
    RunStopped,
    one_line,
)
from lesft.micro_batch import StepKey
from lesft.spec import RunSpec
from lesft.wire import WireCounter

log = logging.getLogger(__name__)

_ROUNDS_OF_ESTIMATE = 10


class RunState(enum.Enum):
    """Where a run stands."""

    WAITING = "waiting for clients"
    TRAINING = "training"
    FINISHED = "finished"
    STOPPED = "stopped"


RUN_MOVES: dict[RunState, frozenset[RunState]] = {
    RunState.WAITING: frozenset({RunState.TRAINING, RunState.STOPPED}),
    RunState.TRAINING: frozenset({RunState.FINISHED, RunState.STOPPED}),
    RunState.FINISHED: frozenset(),
    RunState.STOPPED: frozenset(),
}
"""The legal moves. A server that is started again begins in the state of its checkpoint: WAITING
where there is none, else TRAINING or FINISHED."""


@dataclass
class Member:
    """One client of the run."""

    client_id: str
    num_samples: int
    instance_id: str
    tell: Callable[[LesftError], None] | None = None
    """Ends the client's call with an error; None while the client is away."""
    away_because: str = "the server was started again"
    next_key: StepKey = field(default_factory=lambda: StepKey(0, 0))
    """The micro-batch that is due from it."""
    last_seen: float = 0.0
    resumed: int = 0
    """How often it came back."""
    left: bool = False
    """Whether it said that it goes, before the end."""
    samples_trained: int = 0
    """Of it that went through the model, repeats counted, in the course that led to it."""
    wire: WireCounter = field(default_factory=WireCounter)
    """Of its training streams since the server was started."""

    @property
    def connected(self) -> bool:
        """Whether it has a session."""
        return self.tell is not None


@dataclass(frozen=True)
class RoundRecord:
    """What is known of a finished round: means over the clients by their share, in nats."""

    round: int
    loss: float
    nll: float
    class_counts: tuple[int, int, int] | None
    seconds: float
    device_seconds: Mapping[str, float] = field(default_factory=dict)
    """Where they went, by state; see `lesft_server.device_account`."""


class Run:
    """Members come while the run waits, and then train together.

    In lockstep the run waits for those away; with a deadline it begins and goes on with a quorum.
    Lives on the event loop.
    """

    def __init__(
        self, spec: RunSpec, facts: Mapping[str, Any] | None = None, dropped: Iterable[str] = ()
    ) -> None:
        """`facts` are those of the checkpoint to go on from."""
        self.spec = spec
        self.state = RunState.WAITING
        self.reason = ""
        self.members: dict[str, Member] = {}
        self.rounds: list[RoundRecord] = []
        self.steps = 0
        """Steps that the model has gone through, in the course that led to it."""
        self.lineage = ""
        """SHA-256 chain over these steps: their keys and the clients' requests."""
        self.obstacle = ""
        """Why training cannot go on at the moment, such as a full disk."""
        self.checkpoint_wanted = False
        self.stop_wanted = False
        self.dropped = set(dropped)
        """Clients that an operator has dropped."""
        self.on_change: Callable[[], None] = lambda: None
        """Told whenever a member comes or goes, and when training begins."""
        self._may_step = asyncio.Event()
        self._may_step.set()
        self._start_timer: asyncio.TimerHandle | None = None
        if facts is not None:
            self._restore(facts)

    # ------------------------------------------------------------------ members

    def check_join(self, client_id: str, num_samples: int, instance_id: str) -> None:
        """Refuse a client that cannot be, or be again, a member.

        Raises AlreadyJoined when there is no place for it, HandshakeMismatch when it is not what it
        was, RunStopped when the run or its part in it was ended.
        """
        if self.state is RunState.STOPPED:
            raise RunStopped(f"the run has ended: {self.reason}")
        if client_id in self.dropped:
            raise RunStopped(f"client {client_id!r} was dropped from the run by its operator")
        member = self.members.get(client_id)
        if member is not None:
            self._check_returning(member, num_samples, instance_id)
        elif len(self.members) + len(self.dropped) == self.spec.clients:
            raise AlreadyJoined(
                f"clients: the run has its {self.spec.clients} clients already "
                f"({', '.join(sorted(self.members))}); use one of those names to come back as it"
            )

    def join(
        self, client_id: str, num_samples: int, instance_id: str, tell: Callable[[LesftError], None]
    ) -> Member:
        """A member that comes or comes back. Raises what `check_join` raises."""
        self.check_join(client_id, num_samples, instance_id)
        member = self.members.get(client_id)
        if member is None:
            member = self.members[client_id] = Member(client_id, num_samples, instance_id)
            log.info("%s joined (%d of %d)", client_id, len(self.members), self.spec.clients)
        else:
            member.resumed += 1
            log.info("%s is back", client_id)
        before, member.tell = member.tell, tell
        if before is not None:
            before(AlreadyJoined(f"client {client_id!r} has opened another session"))
        member.instance_id = instance_id
        member.left = False
        member.last_seen = time.time()
        self._start_if_ready()
        return member

    def _start_if_ready(self, deadline_passed: bool = False) -> None:
        """Training begins when all are there, or enough once the deadline has passed."""
        if self.state is not RunState.WAITING:
            return
        there = len(self.members)
        if there + len(self.dropped) == self.spec.clients or (
            deadline_passed and there >= self.spec.required
        ):
            if self._start_timer is not None:
                self._start_timer.cancel()
            self._move(RunState.TRAINING)
            self.on_change()
        elif self.spec.mode == "deadline" and (self._start_timer is None or deadline_passed):
            loop = asyncio.get_running_loop()
            self._start_timer = loop.call_later(
                self.spec.deadline_seconds, self._start_if_ready, True
            )

    def _check_returning(self, member: Member, num_samples: int, instance_id: str) -> None:
        name = member.client_id
        if member.connected and not (instance_id and instance_id == member.instance_id):
            raise AlreadyJoined(
                f"client_id: {name!r} is in the run already; give every client a --client-id "
                "of its own"
            )
        if num_samples != member.num_samples:
            raise HandshakeMismatch(
                f"num_samples: server {member.num_samples}, client {num_samples}; the data of "
                f"{name!r} must stay the same in mid-run"
            )

    def leave(
        self, member: Member, tell: Callable[[LesftError], None], reason: str, left: bool
    ) -> None:
        """A member's session is over; `left` when it said so itself.

        Before training that frees its place.
        """
        if member.tell != tell:
            return  # another session of the same client has taken over
        member.tell = None
        name, reason = member.client_id, one_line(reason)
        member.away_because = reason or "it left"
        member.left = left
        if self.state is RunState.WAITING:
            self.members.pop(name, None)  # it may just have been dropped
            log.info("%s left before the start: %s", name, member.away_because)
        elif self.state is RunState.TRAINING:
            waits = self.spec.mode == "lockstep"
            log.warning(
                "%s is away at %s, the run %s: %s",
                name,
                member.next_key,
                "waits for it" if waits else "may go on without it",
                member.away_because,
            )
        else:
            log.info("%s left%s", name, f": {reason}" * bool(reason))
        self.on_change()

    def drop(self, client_id: str) -> None:
        """Go on without a member for good; the shares follow. Raises NotFound."""
        member = self.members.pop(client_id, None)
        if member is None:
            raise NotFound(f"client {client_id!r} is not in the run: {', '.join(self.members)} are")
        self.dropped.add(client_id)
        log.warning("%s was dropped by the operator", client_id)
        if member.tell is not None:
            member.tell(
                RunStopped(f"client {client_id!r} was dropped from the run by its operator")
            )
        self._start_if_ready()
        self.on_change()

    def shares(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """|D_i| / |D| of the members named, or of all, in client-id order.

        That is the order of every cohort.
        """
        chosen = sorted(self.members if names is None else names)
        total = sum(self.members[name].num_samples for name in chosen)
        return {name: self.members[name].num_samples / total for name in chosen}

    def waiting_for(self, due: Iterable[str]) -> str:
        """What the run waits for, in words; `due` are clients whose part is missing."""
        if self.state is RunState.WAITING:
            missing = self.spec.clients - len(self.members) - len(self.dropped)
            return f"{missing} more {'client' if missing == 1 else 'clients'} to join"
        if self.state is not RunState.TRAINING:
            return ""
        if self.obstacle or self.paused:
            return self.obstacle or "the server's operator, who has paused the run"
        names = sorted(due)
        away = [name for name in names if not self.members[name].connected]
        if away:
            return "; ".join(
                f"client {name!r} to come back ({self.members[name].away_because})" for name in away
            )
        return f"{'client' if len(names) == 1 else 'clients'} {', '.join(names)}" if names else ""

    # ------------------------------------------------------------------ progress

    def count_step(
        self, key: StepKey, digests: Iterable[bytes], num_samples: Mapping[str, int]
    ) -> None:
        """Note a step in the lineage, and how many samples of which clients were in it."""
        self.steps += 1
        for name in num_samples.keys() & self.members.keys():
            self.members[name].samples_trained += num_samples[name]
        text = b"".join([self.lineage.encode(), str(key).encode(), *digests])
        self.lineage = hashlib.sha256(text).hexdigest()

    def record(self, record: RoundRecord) -> None:
        """Note a finished round."""
        self.rounds.append(record)
        log.info("round %d of %d: loss %.4f", record.round + 1, self.spec.rounds, record.loss)

    def seconds_left(self) -> float | None:
        """Estimate from the last rounds; None before the first round's end."""
        if not self.rounds:
            return None
        last = self.rounds[-_ROUNDS_OF_ESTIMATE:]
        mean = sum(record.seconds for record in last) / len(last)
        return mean * (self.spec.rounds - len(self.rounds))

    def finish(self) -> None:
        """The last round is done and kept."""
        self._move(RunState.FINISHED)

    def stop(self, reason: str) -> None:
        """End the run early and tell every connected member why. Does nothing when it has ended."""
        if not RUN_MOVES[self.state]:
            return
        self.reason = reason
        self._move(RunState.STOPPED)
        self.hang_up(RunStopped(f"the run has ended: {reason}"))

    def hang_up(self, error: LesftError) -> None:
        """End every member's session with an error."""
        for member in list(self.members.values()):
            if member.tell is not None:
                member.tell(error)

    # ------------------------------------------------------------------ operators

    @property
    def paused(self) -> bool:
        """Whether no step is taken until `go_on`."""
        return not self._may_step.is_set()

    def pause(self) -> None:
        """Take no further step; those under way end."""
        if not self.paused:
            log.info("paused by the operator")
        self._may_step.clear()

    def go_on(self) -> None:
        """Take steps again."""
        if self.paused:
            log.info("resumed by the operator")
        self._may_step.set()
        self.on_change()

    async def may_step(self) -> None:
        """Wait while the run is paused."""
        await self._may_step.wait()

    # ------------------------------------------------------------------ checkpoints

    def facts(self) -> dict[str, Any]:
        """What `Run` needs of a checkpoint to go on from here."""
        return {
            "members": [
                {
                    "client_id": member.client_id,
                    "num_samples": member.num_samples,
                    "instance_id": member.instance_id,
                    "resumed": member.resumed,
                    "samples_trained": member.samples_trained,
                }
                for member in self.members.values()
            ],
            "rounds": [vars(record) for record in self.rounds],
            "steps": self.steps,
            "lineage": self.lineage,
        }

    def _restore(self, facts: Mapping[str, Any]) -> None:
        next_key = StepKey(len(facts["rounds"]), 0)
        for values in facts["members"]:
            if values["client_id"] not in self.dropped:
                self.members[values["client_id"]] = Member(**values, next_key=next_key)
        for values in facts["rounds"]:
            counts = values["class_counts"]
            self.rounds.append(
                RoundRecord(**{**values, "class_counts": tuple(counts) if counts else None})
            )
        self.steps, self.lineage = facts["steps"], facts["lineage"]
        self._move(RunState.TRAINING)
        if len(self.rounds) == self.spec.rounds:
            self._move(RunState.FINISHED)

    def _move(self, state: RunState) -> None:
        assert state in RUN_MOVES[self.state], f"{self.state} does not lead to {state}"
        self.state = state
        log.info(
            "run %s: %s%s", self.spec.run_id, state.value, f": {self.reason}" * bool(self.reason)
        )
