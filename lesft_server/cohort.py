"""The cohort: all clients' parts of one micro-batch, batched into one step of the back.

A step ends when its answers are in the ledger, and after the last one of a round with a checkpoint,
when that is on disk. Only then does anyone get an answer.
"""

import asyncio
import enum
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lesft.adapter_halves import AdapterHalf, HalfInfo, save_half
from lesft.back import Back
from lesft.checkpoints import Checkpoint
from lesft.cohort_batch import Part
from lesft.device_thread import DeviceThread
from lesft.errors import LeftBehind, LesftError, OutOfOrder, RunStopped, Unreachable
from lesft.identity.attestation import Attester
from lesft.logs import note
from lesft.micro_batch import MicroBatch, StepKey, StepResult, sum_class_counts
from lesft.sample_memory import ClientMemory
from lesft.step_messages import result_to_message
from lesft.training_state import adapter_of
from lesft.v1 import receipt_pb2, training_pb2
from lesft_server.device_account import DeviceAccount
from lesft_server.journal import Journal
from lesft_server.ledger import Entry, check_same
from lesft_server.run import RoundRecord, Run, RunState
from lesft_server.step_clock import StepClock

log = logging.getLogger(__name__)

MAX_MISSES = 3
"""Sessions in a row of a client that rounds may wait for in vain, with a deadline: one that comes
back again and again without ever sending a right part must not hold the others up each time."""

FORGIVING_DEADLINES = 20
"""A client whose last such session is so many deadlines ago is waited for again: else one that is a
little slower than the others might never be in time."""

_STOP_SECONDS = 5.0
"""What clients get to take their checkpoints before an operator's stop ends their sessions."""


@dataclass(frozen=True)
class Request:
    """A client's micro-batch, the SHA-256 of what it sent, and where its samples are remembered."""

    batch: MicroBatch
    digest: bytes
    memory: ClientMemory | None = None


@dataclass(frozen=True)
class StepTimes:
    """When the back began and ended, by `time.monotonic`."""

    began: float
    ended: float


class StepState(enum.Enum):
    """Where the step of one key stands."""

    COLLECTING = "collecting"
    STEPPING = "stepping"
    KEPT = "kept"
    FAILED = "failed"


STEP_MOVES: dict[StepState, frozenset[StepState]] = {
    StepState.COLLECTING: frozenset({StepState.STEPPING}),
    StepState.STEPPING: frozenset({StepState.KEPT, StepState.FAILED}),
    StepState.KEPT: frozenset(),
    StepState.FAILED: frozenset(),
}


class _Part:
    """One client's request, and the answer's being kept."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.kept: asyncio.Future[StepTimes] = asyncio.get_running_loop().create_future()

    def refuse(self, error: LesftError) -> None:
        """Whoever waits for the answer gets an error."""
        self.kept.set_exception(error)
        self.kept.exception()  # nobody need be waiting


class _Step:
    """The parts of one key, from the first one's coming until the answers are kept."""

    def __init__(self, key: StepKey) -> None:
        self.key = key
        self.state = StepState.COLLECTING
        self.collecting_since = time.monotonic()
        self.complete = 0.0
        """When all parts were there that it began with."""
        self.parts: dict[str, _Part] = {}
        self.shares: dict[str, float] = {}
        """Of the clients in it, once it has begun."""
        self.timer: asyncio.TimerHandle | None = None
        self.deadline_passed = False

    def move(self, state: StepState) -> None:
        """Go on to the next state."""
        assert state in STEP_MOVES[self.state], f"{self.state} does not lead to {state}"
        self.state = state


class Cohort:
    """Collects parts by key; a step begins when the parts of all that are expected are there.

    In lockstep these are all members. With a deadline they are, at the beginning of a round, all
    that took part in the round before or have connected since, and within a round all that take
    part in it; once the deadline has passed a quorum of them suffices, and whoever is late rejoins
    at the next round. Steps begin in the order of their keys. A part stays when its client goes
    away: the step is taken without asking for it again, and the answer waits in the ledger.
    """

    def __init__(
        self,
        run: Run,
        back: Back,
        device: DeviceThread,
        journal: Journal,
        adapter_file: Path,
        clock: StepClock,
        attester: Attester,
        account: DeviceAccount,
    ) -> None:
        """`adapter_file` is where Φ is written after the last round."""
        self._attester = attester
        self._account = account
        self._run = run
        self._back = back
        self._device = device
        self._journal = journal
        self._adapter_file = adapter_file
        self._clock = clock
        self._steps: dict[StepKey, _Step] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._window: list[tuple[Sequence[float], list[StepResult]]] = []
        self._window_start: float | None = None
        self._back_failed = False
        """Of the device's thread, where later steps may wait already: none may follow."""
        self._last_checkpoint = len(run.rounds)
        self._taking_part = set(run.members)
        """Clients whose parts were in the newest step."""
        self._missing: set[str] = set()
        """Connected clients that a round began without: one deadline a session is enough."""
        self._misses: Counter[str] = Counter()
        """Sessions of a client that handed in no part, since one last did."""
        self._missed_at: dict[str, float] = {}
        """When the last of them was seen to."""
        self.next_key = StepKey(len(run.rounds), 0)
        """The first step whose answers are not kept."""
        self._to_begin = self.next_key
        """The first step that has not begun."""
        run.on_change = self._begin_what_is_complete

    def close(self) -> None:
        """Drop the steps under way; nobody gets their answers."""
        for task in self._tasks:
            task.cancel()

    # ------------------------------------------------------------------ parts

    async def take(self, client_id: str, request: Request) -> StepTimes | None:
        """Hand in a client's part, or the same once more; returns once its answer is kept.

        None for an answer that was kept before.

        Raises OutOfOrder for another part than the one before under the same key, LeftBehind when
        the step went on without this client.
        """
        key = request.batch.key
        if self._journal.ledger.find(client_id, key, request.digest) and key < self.next_key:
            return None
        step = self._steps.get(key)
        part = step.parts.get(client_id) if step else None
        if part is not None:
            check_same(client_id, key, part.request.digest, request.digest)
        elif key < self._to_begin or self._is_out(client_id, key):
            raise self._too_late(client_id, key)
        else:
            part = self._add(client_id, _Part(request))
        return await asyncio.shield(part.kept)

    def _add(self, client_id: str, part: _Part) -> _Part:
        key = part.request.batch.key
        step = self._steps.setdefault(key, _Step(key))
        step.parts[client_id] = part
        now = time.monotonic()
        self._account.begin(now)
        self._window_start = self._window_start or now
        self._begin_what_is_complete()
        return part

    def _too_late(self, client_id: str, key: StepKey) -> LesftError:
        if self._run.spec.mode == "deadline":
            return LeftBehind(f"client {client_id!r} was late for {key}, which went on without it")
        return OutOfOrder(f"{key} was done, but its answer is no longer kept")

    @property
    def num_waiting(self) -> int:
        """Micro-batches that wait for those of other clients."""
        collecting = [s for s in self._steps.values() if s.state is StepState.COLLECTING]
        return sum(len(step.parts) for step in collecting)

    def due(self) -> list[str]:
        """The clients whose part of the next step is missing."""
        step = self._steps.get(self._to_begin)
        return sorted(self._expected(self._to_begin) - (step.parts.keys() if step else set()))

    def can_go_on_at(self, client_id: str, key: StepKey) -> bool:
        """Whether a client can go on from a key: it took part in all that has begun since."""
        if key > self._to_begin or key.round < self._journal.ledger.first_round:
            return False
        while key < self._to_begin:
            step = self._steps.get(key)
            if not self._journal.ledger.has(client_id, key) and not (
                step and client_id in step.parts
            ):
                return False
            key = key.following(self._run.spec.accumulation)
        return not self._is_out(client_id, key)

    def rejoins_at(self) -> int | None:
        """The round at which a client can rejoin that the others went on without.

        None in lockstep. Raises Unreachable before the run has begun.
        """
        if self._run.spec.mode == "lockstep":
            return None
        if self._run.state is RunState.WAITING:
            raise Unreachable("the run has not begun: there is nothing to rejoin yet")
        return self._to_begin.round + (self._to_begin.micro > 0)

    def welcome(self, client_id: str) -> None:
        """A client has opened a session: the next round waits for it, unless that was in vain."""
        patience = FORGIVING_DEADLINES * self._run.spec.deadline_seconds
        if self._misses[client_id] < MAX_MISSES or (
            time.monotonic() - self._missed_at[client_id] > patience
        ):
            self._missing.discard(client_id)

    def came_in_vain(self, client_id: str) -> None:
        """A session has ended that handed in no part: after a few of them no round waits."""
        if client_id not in self._missing:  # else it was counted when the round began
            self._misses[client_id] += 1
        self._missed_at[client_id] = time.monotonic()
        if self._misses[client_id] >= MAX_MISSES:
            self._missing.add(client_id)

    def withdraw(self, client_id: str) -> None:
        """Drop a client's parts of the steps that have not begun: it will send them again."""
        for key, step in list(self._steps.items()):
            if step.state is StepState.COLLECTING:
                step.parts.pop(client_id, None)
                if not step.parts:
                    self._drop_timer(step)
                    del self._steps[key]

    def goes_on_without(self, client_id: str, until_round: int) -> None:
        """A client rejoins at a round: no step of an earlier one waits for it."""
        if until_round > self._to_begin.round:
            self._taking_part.discard(client_id)
            self._begin_what_is_complete()

    # ------------------------------------------------------------------ when a step begins

    def _is_out(self, client_id: str, key: StepKey) -> bool:
        """Whether the round of a key, or the rest of it, goes on without a client."""
        in_mid_round = key.round == self._to_begin.round and self._to_begin.micro > 0
        return in_mid_round and client_id not in self._taking_part

    def _expected(self, key: StepKey) -> set[str]:
        members = self._run.members
        if self._run.spec.mode == "lockstep":
            return set(members)
        if key.micro > 0:
            return self._taking_part & members.keys()
        return {
            name
            for name, member in members.items()
            if (member.connected and name not in self._missing)
            or (name in self._taking_part and not member.left)
        }

    def _can_come(self, key: StepKey) -> Collection[str]:
        """The clients that can have a part in a step, sooner or later."""
        in_mid_round = self._run.spec.mode == "deadline" and key.micro > 0
        return self._expected(key) if in_mid_round else self._run.members

    def _needed(self, key: StepKey) -> int:
        """Parts without which a step does not begin, whatever the deadline."""
        return min(self._run.spec.required, len(self._can_come(key)))

    def _begin_what_is_complete(self) -> None:
        while self._run.state is RunState.TRAINING:
            if self._run.members and not self._can_come(self._to_begin):
                self._run.stop(
                    f"no client is left that can finish round {self._to_begin.round}; start server "
                    "and clients again with the same --state to go on from the last checkpoint"
                )
                return
            step = self._steps.get(self._to_begin)
            # A round begins when the one before is kept: its checkpoint is of that moment.
            if step is None or (step.key.micro == 0 and step.key != self.next_key):
                return
            members = self._run.members
            for name in step.parts.keys() - members.keys():
                step.parts.pop(name)  # of a client that was dropped
            if not step.parts:
                return
            complete = self._expected(step.key) <= step.parts.keys()
            enough = len(step.parts) >= self._needed(step.key)
            if not enough or not (complete or step.deadline_passed):
                self._set_deadline(step)
                return
            self._begin(step)

    def _set_deadline(self, step: _Step) -> None:
        """From the moment on that a step waits for nothing but its parts."""
        if self._run.spec.mode == "lockstep" or self._run.paused or step.key != self.next_key:
            return
        if step.timer is None:
            loop = asyncio.get_running_loop()
            step.timer = loop.call_later(self._run.spec.deadline_seconds, self._on_deadline, step)

    def _begin(self, step: _Step) -> None:
        """In a task of its own: the step must not end with the call of whoever came last."""
        self._drop_timer(step)
        step.move(StepState.STEPPING)
        step.complete = time.monotonic()
        step.shares = self._run.shares(step.parts)
        late = self._expected(step.key) - step.parts.keys()
        if late:
            log.warning("%s begins without %s", step.key, ", ".join(sorted(late)))
        self._misses.update(late)
        self._missed_at.update(dict.fromkeys(late, time.monotonic()))
        for name in step.parts:
            del self._misses[name]
        self._missing = (self._missing | late) - step.parts.keys()
        self._taking_part = set(step.parts)
        self._to_begin = step.key.following(self._run.spec.accumulation)
        for other in list(self._steps.values()):
            if other.key > step.key and other.key.round == step.key.round:
                for name in other.parts.keys() - self._taking_part:
                    other.parts.pop(name).refuse(self._too_late(name, other.key))
        task = asyncio.create_task(self._run_step(step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_deadline(self, step: _Step) -> None:
        if self._run.paused:
            step.timer = None  # it begins anew when the run goes on
            return
        step.deadline_passed = True
        needed = self._needed(step.key)
        if len(step.parts) < needed:
            log.warning(
                "%s: the deadline has passed with %d clients, %d are needed: waiting on for %s",
                step.key,
                len(step.parts),
                needed,
                ", ".join(self.due()) or "others to join",
            )
        self._begin_what_is_complete()

    def _drop_timer(self, step: _Step) -> None:
        if step.timer is not None:
            step.timer.cancel()

    # ------------------------------------------------------------------ the step

    async def _run_step(self, step: _Step) -> None:
        """Run a complete cohort in client-id order and keep the answers."""
        key = step.key
        note(round=key.round, client=None)
        try:
            await self._run.may_step()
            self._stop_if_asked(key)
            times = await self._take_step(step)
        except Exception as error:
            if not isinstance(error, LesftError):
                log.exception("%s failed", key)
                error = RunStopped(f"{key} failed on the server; its log has the details")
            step.move(StepState.FAILED)
            self._run.stop(str(error))  # ends every call that waits for this step
            return
        assert key == self.next_key, "steps are taken and kept in the order of their keys"
        step.move(StepState.KEPT)
        self.next_key = key.following(self._run.spec.accumulation)
        del self._steps[key]
        for part in step.parts.values():
            part.kept.set_result(times)
        if self.next_key.round == self._run.spec.rounds:
            self._run.finish()
        elif self._run.stop_wanted:
            self.stop_after_round()
        self._begin_what_is_complete()

    async def _take_step(self, step: _Step) -> StepTimes:
        run, key, shares = self._run, step.key, step.shares
        requests = {name: step.parts[name].request for name in shares}
        parts = [
            Part(name, requests[name].batch, share, requests[name].memory)
            for name, share in shares.items()
        ]

        def train() -> tuple[list[StepResult], StepTimes, dict[str, torch.Tensor] | None]:
            if self._back_failed or run.state is not RunState.TRAINING:
                raise RunStopped(f"{key} came too late")
            began = time.monotonic()
            self._back_failed = True  # unless this step goes well
            with self._clock.phase("back", key.round, micro=key.micro, clients=len(parts)):
                results = self._back.train_step(key, parts)
            self._back_failed = False
            times = StepTimes(began, time.monotonic())
            waited = self._account.step(
                key.micro == 0, step.collecting_since, step.complete, times.began, times.ended
            )
            self._clock.between("cohort_wait", key.round, *waited)
            return results, times, self._back.state() if self._checkpoint_is_due(key) else None

        results, times, tensors = await self._device.run(train)
        digests = [requests[name].digest for name in shares]
        sizes = {name: len(requests[name].batch.targets.lengths) for name in shares}
        run.count_step(key, digests, sizes)
        receipts = self._receipts(key, shares)
        self._record(key, list(shares.values()), results, times.ended)

        def entries() -> list[Entry]:
            encoding, last = run.spec.gradient_encoding, tensors is not None
            with self._clock.phase("encode", key.round):
                answers = [
                    result_to_message(replace(result, checkpoint=last), encoding)
                    for result in results
                ]
                return [
                    Entry(
                        name, requests[name].digest, _with_receipt(header, receipts.get(name)), data
                    )
                    for name, (header, data) in zip(shares, answers, strict=True)
                ]

        await self._journal.append(entries)
        if tensors is not None:
            run.checkpoint_wanted = False
            checkpoint = Checkpoint(key.round + 1, tensors, run.facts())
            await self._journal.checkpoint(checkpoint, lambda: self.write_adapter(checkpoint))
            self._last_checkpoint = checkpoint.round
            log.info("checkpoint taken after round %d", checkpoint.round)
        self._account.kept(time.monotonic())
        return times

    def _receipts(self, key: StepKey, names: Iterable[str]) -> dict[str, receipt_pb2.Receipt]:
        """What these clients have trained, where their adapters are averaged next."""
        run, spec = self._run, self._run.spec
        ends_round = key.micro == spec.accumulation - 1
        if not ends_round or not spec.aggregates_after(key.round):
            return {}
        fingerprint = spec.fingerprint_of_clients()
        return {
            name: self._attester.receipt(
                receipt_pb2.Statement(
                    run_id=spec.run_id,
                    run_fingerprint=fingerprint,
                    client_id=name,
                    base_version=spec.aggregations_before(key.round),
                    rounds=key.round + 1,
                    num_samples=run.members[name].num_samples,
                    samples_trained=run.members[name].samples_trained,
                    run_instance=self._journal.run_instance,
                )
            )
            for name in names
            if name in run.members
        }

    def _checkpoint_is_due(self, key: StepKey) -> bool:
        run = self._run
        return key.micro == run.spec.accumulation - 1 and (
            run.spec.ends_interval(key.round) or run.checkpoint_wanted or run.stop_wanted
        )

    def write_adapter(self, checkpoint: Checkpoint) -> None:
        """Φ as its own file, after the last round."""
        spec = self._run.spec
        if checkpoint.round == spec.rounds:
            info = HalfInfo.of(spec, "back", rounds=checkpoint.round)
            save_half(self._adapter_file, AdapterHalf(info, adapter_of(checkpoint.tensors)))

    def stop_after_round(self) -> None:
        """Stop the run at the end of the round under way, with a checkpoint on all sides.

        The clients get a while to take theirs; one that is away is answered from the ledger when
        all are started again.
        """
        if not self._run.stop_wanted:
            log.info("the run stops after the round under way, as its operator wants")
        self._run.stop_wanted = True
        if self._may_stop_before(self.next_key):
            loop = asyncio.get_running_loop()
            loop.call_later(_STOP_SECONDS, self._stop_now, self.next_key)

    def _may_stop_before(self, key: StepKey) -> bool:
        return self._run.stop_wanted and key == StepKey(self._last_checkpoint, 0)

    def _stop_now(self, key: StepKey) -> None:
        if key == self.next_key and self._may_stop_before(key):
            self._run.stop(_stopped_by_operator(key))

    def _stop_if_asked(self, key: StepKey) -> None:
        """When every client has sent a part of the round after a checkpoint, all have theirs."""
        if self._may_stop_before(key):
            raise RunStopped(_stopped_by_operator(key))

    def _record(
        self, key: StepKey, shares: Sequence[float], results: list[StepResult], now: float
    ) -> None:
        self._window.append((shares, results))
        if key.micro < self._run.spec.accumulation - 1:
            return
        window, self._window = self._window, []
        start, self._window_start = self._window_start or now, now
        self._clock.round_done(key.round, now - start)
        self._run.record(
            RoundRecord(
                round=key.round,
                loss=_mean_by_share(window, lambda result: result.loss),
                nll=_mean_by_share(window, lambda result: result.nll),
                class_counts=sum_class_counts([r for _, results in window for r in results]),
                seconds=now - start,
                device_seconds=self._account.round_done(),
            )
        )


def _stopped_by_operator(key: StepKey) -> str:
    return (
        f"its operator stopped it after round {key.round}; start server and clients again with the "
        "same --state to go on"
    )


def _mean_by_share(
    window: list[tuple[Sequence[float], list[StepResult]]], figure: Callable[[StepResult], float]
) -> float:
    sums = [
        sum(share * figure(result) for share, result in zip(shares, results, strict=True))
        for shares, results in window
    ]
    return sum(sums) / len(sums)


def _with_receipt(
    header: training_pb2.StepResult, receipt: receipt_pb2.Receipt | None
) -> training_pb2.StepResult:
    if receipt is not None:
        header.receipt.CopyFrom(receipt)
    return header
