"""One run: its state, its members and what came of its rounds."""

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lesft.errors import AlreadyJoined, LesftError, RunStopped, one_line
from lesft.micro_batch import StepKey
from lesft.spec import RunSpec

log = logging.getLogger(__name__)


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


@dataclass
class Member:
    """One client of the run."""

    client_id: str
    num_samples: int
    tell: Callable[[LesftError], None]
    """Ends the client's call with an error."""
    connected: bool = True
    next_key: StepKey = field(default_factory=lambda: StepKey(0, 0))
    last_seen: float = field(default_factory=time.time)


@dataclass(frozen=True)
class RoundRecord:
    """What is known of a finished round: means over the clients by their share, in nats."""

    round: int
    loss: float
    nll: float
    class_counts: tuple[int, int, int] | None
    seconds: float


class Run:
    """Members come while the run waits and train in lockstep; whoever breaks off stops it."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.state = RunState.WAITING
        self.reason = ""
        self.members: dict[str, Member] = {}
        self.rounds: list[RoundRecord] = []

    def join(self, client_id: str, num_samples: int, tell: Callable[[LesftError], None]) -> Member:
        """A new member. Raises AlreadyJoined or RunStopped when there is no place for it."""
        if not RUN_MOVES[self.state]:
            raise RunStopped(f"the run has ended: {self.reason or 'all its rounds are done'}")
        if client_id in self.members:
            raise AlreadyJoined(
                f"client_id: {client_id!r} is in the run already; give every client a --client-id "
                "of its own"
            )
        if len(self.members) == self.spec.clients:
            raise AlreadyJoined(
                f"clients: the run has its {self.spec.clients} clients already "
                f"({', '.join(sorted(self.members))})"
            )
        member = self.members[client_id] = Member(client_id, num_samples, tell)
        log.info("%s joined (%d of %d)", client_id, len(self.members), self.spec.clients)
        if len(self.members) == self.spec.clients:
            self._move(RunState.TRAINING)
        return member

    def leave(self, member: Member, reason: str) -> None:
        """A member is gone. Before training that frees its place, in mid-run it stops the run."""
        member.connected = False
        name, reason = member.client_id, one_line(reason) or "no reason given"
        if self.state is RunState.WAITING:
            del self.members[name]
            log.info("%s left before the start: %s", name, reason)
        elif self.state is RunState.TRAINING:
            self.stop(f"client {name!r} left at {member.next_key}: {reason}")
        else:
            log.info("%s left", name)

    def shares(self) -> dict[str, float]:
        """Each member's |D_i| / |D|, in client-id order: the order of every cohort."""
        total = sum(member.num_samples for member in self.members.values())
        return {name: self.members[name].num_samples / total for name in sorted(self.members)}

    def record(self, record: RoundRecord) -> None:
        """Note a finished round; the last one finishes the run."""
        self.rounds.append(record)
        log.info("round %d of %d: loss %.4f", record.round + 1, self.spec.rounds, record.loss)
        if len(self.rounds) == self.spec.rounds:
            self._move(RunState.FINISHED)

    def stop(self, reason: str) -> None:
        """End the run early and tell every connected member why. Does nothing when it has ended."""
        if not RUN_MOVES[self.state]:
            return
        self.reason = reason
        self._move(RunState.STOPPED)
        for member in self.members.values():
            if member.connected:
                member.tell(RunStopped(f"the run has ended: {reason}"))

    def _move(self, state: RunState) -> None:
        assert state in RUN_MOVES[self.state], f"{self.state} does not lead to {state}"
        self.state = state
        log.info(
            "run %s: %s%s", self.spec.run_id, state.value, f": {self.reason}" * bool(self.reason)
        )
