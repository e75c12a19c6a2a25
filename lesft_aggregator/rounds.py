"""The life of aggregation rounds: who may submit what and when, and when a round is averaged.

One round is open at a time. It is named for its base version, the version that its clients
trained from; its mean is published as base version + 1, and that opens the next round.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors.numpy import save

from lesft.adapter_codec import decode, decoded_bytes, encode
from lesft.errors import (
    HandshakeMismatch,
    InternalError,
    InvalidInput,
    LesftError,
    NotFound,
    OutOfOrder,
    StaleVersion,
    Unreachable,
)
from lesft.files import when_there_is_room
from lesft.logs import note
from lesft.spec import AdapterEncoding
from lesft.tracing import span
from lesft_aggregator.adapters import check_layout, read_layout
from lesft_aggregator.admission import (
    Introduction,
    check_fingerprint,
    check_introduction,
    check_protocol,
)
from lesft_aggregator.mean import weighted_mean
from lesft_aggregator.norms import AdapterNorms
from lesft_aggregator.receipts import check_run_instance
from lesft_aggregator.settings import AggregatorSettings
from lesft_aggregator.store import Store
from lesft_aggregator.tables import Adapter, Submission

log = logging.getLogger(__name__)

T = TypeVar("T")


class RoundState(Enum):
    """Where a round is in its life."""

    OPEN = "open"
    AVERAGING = "averaging"
    PUBLISHED = "published"


MOVES: dict[RoundState, tuple[RoundState, ...]] = {
    RoundState.OPEN: (RoundState.AVERAGING,),
    RoundState.AVERAGING: (RoundState.PUBLISHED,),
    RoundState.PUBLISHED: (),
}
"""The legal moves. A round whose averaging was cut off is open again after the restart."""


class Round:
    """The open round, or the one that is being averaged."""

    def __init__(self, base_version: int) -> None:
        self.base_version = base_version
        self.state = RoundState.OPEN
        self.deadline_passed = False
        self.deadline: datetime | None = None
        """When it passes or has passed; None until the first submission, or where there is none."""

    def move(self, to: RoundState) -> None:
        """Go on to the next state."""
        assert to in MOVES[self.state], f"a round cannot go from {self.state} to {to}"
        self.state = to


class Receipt(NamedTuple):
    """A submission is stored and will count."""

    version: int
    received: int
    """Clients whose submissions for that version are stored."""
    repeated: bool
    """Whether it was stored before already."""


class Rounds:
    """All rounds of one run. Lives on one event loop; disk and numpy work goes to threads.

    Every change is one task under one lock, which runs to its end even when the client that
    asked for it goes away.
    """

    def __init__(
        self,
        store: Store,
        settings: AggregatorSettings,
        on_published: Callable[[Adapter, float], None],
        norms: AdapterNorms,
    ) -> None:
        """`on_published` gets each new version and the seconds that averaging it took."""
        self._store = store
        self._settings = settings
        self._on_published = on_published
        self._norms = norms
        self._changing = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._ended: LesftError | None = None
        self.run_fingerprint = ""
        """What the clients of the run agree on: by the server's receipts, or who came first."""
        self.obstacle = ""
        """Why nothing can be kept at the moment: a full disk."""
        self.current = Round(store.version())

    @property
    def version(self) -> int:
        """The newest published version."""
        return self.current.base_version

    @property
    def ended(self) -> LesftError | None:
        """Why no round goes on any more, or None."""
        return self._ended

    async def wait_until_ended(self) -> None:
        """Returns when no round goes on any more: `stop` was called or averaging failed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended)

    async def resume(self) -> None:
        """Go on from what the store holds. A deadline counts anew from here.

        The clients were cut off as long as the aggregator was.
        """
        async with self._changing:
            self._after_submission(self._store.submissions(self.version))

    async def join(
        self, protocol_version: int, client: Introduction, run_fingerprint: str = ""
    ) -> int:
        """Take a client in, again if need be; returns the newest version.

        The first that joins after a start says what the run's fingerprint is. Raises
        HandshakeMismatch or InvalidInput.
        """
        check_protocol(protocol_version)
        return await self._in_turn(lambda: self._join(client, run_fingerprint))

    async def _join(self, client: Introduction, run_fingerprint: str) -> int:
        self._check_introduction(client)
        check_fingerprint(self.run_fingerprint, run_fingerprint)
        log.info("%s joined", client.client_id)
        self.run_fingerprint = self.run_fingerprint or run_fingerprint
        await self._when_there_is_room(
            lambda: self._store.join(client.client_id, client.num_samples)
        )
        return self.version

    def check(self, client: Introduction, base_version: int) -> None:
        """Refuse a submission that cannot be accepted whatever its bytes are.

        Raises InvalidInput, HandshakeMismatch, StaleVersion, OutOfOrder or Unreachable.
        """
        self._check_introduction(client)
        if base_version > self.version:
            raise OutOfOrder(
                f"base_version {base_version} is not published yet: the current version is "
                f"{self.version}, fetch it and train from there"
            )
        if self._store.submission(base_version, client.client_id) is not None:
            return
        if base_version < self.version:
            raise StaleVersion(
                f"base_version {base_version} is closed: the current version is {self.version}, "
                "fetch it and train from there"
            )
        if self.current.state is not RoundState.OPEN:
            raise StaleVersion(
                f"base_version {base_version} is closed: its round is being averaged without "
                f"{client.client_id!r}; fetch version {base_version + 1} and train from there"
            )

    async def submit(
        self,
        client: Introduction,
        base_version: int,
        data: bytes,
        encoding: AdapterEncoding = "raw",
        base_crc32: int = 0,
        run_instance: str | None = None,
    ) -> Receipt:
        """Keep a client's adapter. The same submission again gets its answer again.

        `base_crc32` says what it is a change to, where it is encoded as one, and `run_instance`
        which run of the server's it is of, where the server vouches for it. Raises what `check`
        raises, HandshakeMismatch for a change to something else, NotAllowed for another run,
        BundleError for bytes that cannot be averaged, OutOfOrder for other bytes than the client's
        earlier ones for the same version.
        """
        self._check_base(client, base_version, encoding, base_crc32)
        return await self._in_turn(
            lambda: self._submit(client, base_version, data, encoding, run_instance)
        )

    async def _submit(
        self,
        client: Introduction,
        base_version: int,
        data: bytes,
        encoding: AdapterEncoding,
        run_instance: str | None,
    ) -> Receipt:
        self.check(client, base_version)
        if run_instance is not None:
            check_run_instance(self._store.run_instance(), run_instance)
        known = self._store.submission(base_version, client.client_id)
        if known is None:
            await self._when_there_is_room(
                lambda: self._keep(client, base_version, data, encoding, run_instance or "")
            )
        else:
            await asyncio.to_thread(_check_repeat, known, client, data)
        received = self._store.submissions(base_version)
        if known is None:
            log.info(
                "version %d: %s submitted, %d of %d",
                base_version + 1,
                client.client_id,
                len(received),
                self._settings.clients,
            )
            self._after_submission(received)
        return Receipt(base_version + 1, len(received), known is not None)

    def _keep(
        self,
        client: Introduction,
        base_version: int,
        sent: bytes,
        encoding: AdapterEncoding,
        run_instance: str,
    ) -> None:
        data = sent
        if encoding != "raw":
            most, base = self._settings.max_submission_mib << 20, self._store.tensors(base_version)
            data = save(decode(sent, encoding, base, most))
        layout = read_layout(data)
        expected = self._store.layout()
        if expected is not None:
            check_layout(layout, expected)
        self._store.add_submission(
            base_version,
            client.client_id,
            client.num_samples,
            self._norms.admit(data),
            layout,
            sha256=hashlib.sha256(sent).hexdigest(),
            encoding=encoding,
            run_instance=run_instance,
        )

    def _check_base(
        self, client: Introduction, base_version: int, encoding: AdapterEncoding, crc32: int
    ) -> None:
        """A change to other values than ours would make others of it."""
        base = self._store.adapter(base_version)
        if encoding != "raw" and base is not None and base.values_crc32 != crc32:
            raise HandshakeMismatch(
                f"base_crc32: version {base_version} has {base.values_crc32:08x} here, "
                f"{client.client_id!r} has {crc32:08x}: it is of another run of that name; start "
                "the client with --fresh"
            )

    async def wait_for_version(self, version: int) -> Adapter:
        """A published version, as soon as it is.

        Raises InvalidInput for version 0, NotFound for one beyond the round that is open,
        Unreachable or InternalError when no round goes on any more.
        """
        if version < 1:
            raise InvalidInput(f"version must be at least 1, got {version}: 0 was never averaged")
        if version > self.version + 1:
            raise NotFound(
                f"version {version} is not in sight: the current version is {self.version}, the "
                f"open round will become {self.version + 1}"
            )
        async with self._changed:
            await self._changed.wait_for(lambda: self.version >= version or self._ended)
        adapter = self._store.adapter(version)
        if adapter is None:
            assert self._ended is not None
            raise self._ended
        return adapter

    async def stop(self, reason: str) -> None:
        """End all waiting with Unreachable, let an averaging under way finish.

        The clients try again until the aggregator is started again.
        """
        if self._timer is not None:
            self._timer.cancel()
        await self._end(Unreachable(reason))
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _check_introduction(self, client: Introduction) -> None:
        if self._ended is not None:
            raise self._ended
        known = [row.client_id for row in self._store.clients()]
        check_introduction(client, self._settings.run_id, self._settings.clients, known)

    def _after_submission(self, received: Sequence[Submission]) -> None:
        """Close the round, or see to it that its deadline will."""
        if self.current.state is not RoundState.OPEN or not received:
            return
        enough = len(received) >= self._settings.required
        everyone = len(received) >= self._settings.clients
        if everyone or (enough and self.current.deadline_passed):
            self.current.move(RoundState.AVERAGING)
            self._start(self._average(received))
        elif self._settings.deadline_seconds and self._timer is None:
            loop, seconds = asyncio.get_running_loop(), self._settings.deadline_seconds
            self._timer = loop.call_later(seconds, self._on_deadline)
            self.current.deadline = datetime.now(timezone.utc) + timedelta(seconds=seconds)

    def _on_deadline(self) -> None:
        self._start(self._pass_deadline(self.current))

    async def _pass_deadline(self, of: Round) -> None:
        async with self._changing:
            if of is not self.current or of.state is not RoundState.OPEN:
                return
            of.deadline_passed = True
            received = self._store.submissions(of.base_version)
            if len(received) < self._settings.required:
                log.warning(
                    "version %d: deadline of %g s passed with %d of %d clients, %d are needed: "
                    "waiting on; missing: %s",
                    of.base_version + 1,
                    self._settings.deadline_seconds,
                    len(received),
                    self._settings.clients,
                    self._settings.required,
                    ", ".join(self.missing()) or "clients that never joined",
                )
            self._after_submission(received)

    def missing(self) -> list[str]:
        """Known clients whose submission for the open round is not there."""
        received = {part.client_id for part in self._store.submissions(self.version)}
        return [row.client_id for row in self._store.clients() if row.client_id not in received]

    def waiting_for(self) -> str:
        """What the open round waits for, in words."""
        if self.obstacle:
            return self.obstacle
        missing, unknown = self.missing(), self._settings.clients - len(self._store.clients())
        parts = [f"the adapters of {', '.join(missing)}"] if missing else []
        if unknown > 0:
            parts.append(f"{unknown} more {'client' if unknown == 1 else 'clients'} to join")
        return "; ".join(parts) or "the averaging"

    async def _average(self, parts: Sequence[Submission]) -> None:
        version = self.current.base_version + 1
        note(version=version, client=None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        start = time.monotonic()
        try:
            base, run_id = version - 1, self._settings.run_id
            with span("averaging", run_id, base, clients=len(parts), base_version=base):
                adapter = await self._when_there_is_room(lambda: self._publish(version, parts))
        except Exception:
            log.exception("averaging version %d failed", version)
            message = f"averaging version {version} failed; the aggregator's log has the details"
            await self._end(InternalError(message))
            return
        seconds = time.monotonic() - start
        log.info("version %d: published, mean of %d clients", version, len(parts))
        self._on_published(adapter, seconds)
        async with self._changed:
            self.current.move(RoundState.PUBLISHED)
            self.current = Round(version)
            self._changed.notify_all()

    def _publish(self, version: int, parts: Sequence[Submission]) -> Adapter:
        files = [self._store.submission_path(part.base_version, part.client_id) for part in parts]
        weights = [part.num_samples for part in parts]
        mean = weighted_mean(zip(files, weights, strict=True))
        encoding, *others = {part.encoding for part in parts}
        if others or encoding == "raw":
            return self._store.publish(version, parts, save(mean))
        # What the encoding makes of the mean is the version, for those, too, who get it whole.
        base = self._store.tensors(version - 1)
        encoded = encode(mean, encoding, base)
        published = decode(encoded, encoding, base, decoded_bytes(mean))
        if not all(np.isfinite(array).all() for array in published.values()):
            return self._store.publish(version, parts, save(mean))  # too large to be told apart
        return self._store.publish(version, parts, save(published), encoding, encoded)

    async def _when_there_is_room(self, write: Callable[[], T]) -> T:
        """Everything waits while the disk is full, and goes on by itself."""
        state, go_on = self._settings.state, lambda: self._ended is None
        return await asyncio.to_thread(when_there_is_room, write, state, self._note_wait, go_on)

    def _note_wait(self, reason: str) -> None:
        self.obstacle = reason

    async def _end(self, error: LesftError) -> None:
        async with self._changed:
            self._ended = self._ended or error
            self._changed.notify_all()

    async def _in_turn(self, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Make a change when those before it are made; to its end, whoever hangs up meanwhile.

        Who hangs up before its turn is dropped with all that it has sent.
        """
        await self._changing.acquire()

        async def to_its_end() -> T:
            try:
                return await change()
            finally:
                self._changing.release()

        return await asyncio.shield(self._start(to_its_end()))

    def _start(self, change: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _check_repeat(known: Submission, client: Introduction, data: bytes) -> None:
    same = known.sha256 == hashlib.sha256(data).hexdigest()
    if not same or known.num_samples != client.num_samples:
        raise OutOfOrder(
            f"client {known.client_id!r} submitted another adapter for base_version "
            f"{known.base_version} of this run before: a client must not fork; fetch version "
            f"{known.base_version + 1} and train from there"
        )
