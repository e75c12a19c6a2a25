"""What the server must not lose: the ledger of its answers and its checkpoints, in step.

All writing happens on one thread of its own, in the order it was asked for, beside the device's
thread: the next step runs while the answers of the one before are written.
"""

import asyncio
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lesft.adapter_halves import ADAPTER_FILE, SPEC_FILE
from lesft.checkpoints import Checkpoint, CheckpointStore
from lesft.errors import RunStopped
from lesft.files import when_there_is_room, write_atomically
from lesft_server.ledger import Entry, Ledger
from lesft_server.sample_store import SAMPLES_FOLDER
from lesft_server.step_clock import StepClock

BEGUN_FILE = "begun"
CHECKPOINTS_FOLDER = "checkpoints"
DROPPED_FILE = "dropped.json"
LEDGER_FOLDER = "ledger"


class Journal:
    """Ledger and checkpoints of one run in one state folder."""

    def __init__(
        self,
        state: Path,
        run_fingerprint: str,
        clock: StepClock,
        on_wait: Callable[[str], None],
    ) -> None:
        """`on_wait` hears, on another thread, why writing has to wait, and "" when it goes on.

        Raises InvalidInput when the folder holds another run.
        """
        self._state = state
        self._clock = clock
        self._on_wait = on_wait
        self._closing = threading.Event()
        self._failed = False
        """Of the journal's thread, where later jobs may wait already."""
        self._store = CheckpointStore(state / CHECKPOINTS_FOLDER, run_fingerprint)
        rounds = self._store.rounds()
        self.newest = self._store.load(rounds[-1]) if rounds else None
        """The checkpoint to go on from; None for a new run."""
        self.ledger = Ledger(state / LEDGER_FOLDER, self.newest.round if self.newest else 0)
        dropped = state / DROPPED_FILE
        self.dropped: list[str] = json.loads(dropped.read_text()) if dropped.exists() else []
        """The clients that an operator has dropped."""
        begun = state / BEGUN_FILE
        known = begun.read_text() if begun.exists() else ""
        self.run_instance = known or secrets.token_hex(16)
        """Random, kept with the first step: tells this run from others of the same settings."""
        self._instance_is_kept = bool(known)
        self.safe_since = time.monotonic()
        """Work done before this moment would survive a crash: that of the newest checkpoint."""
        self.checkpoint_seconds: float | None = None
        """How long the newest checkpoint of this process took."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    @property
    def has_begun(self) -> bool:
        """Whether a first step was kept, of which clients may have the answers."""
        return self._instance_is_kept or self.newest is not None

    async def append(self, make_entries: Callable[[], Sequence[Entry]]) -> None:
        """Keep the answers of a step; they are made on the journal's thread."""

        def job() -> None:
            if not self._instance_is_kept:
                self._with_room(self._keep_instance)
            entries = make_entries()
            with self._clock.phase("ledger", entries[0].header.round):
                self._with_room(lambda: self.ledger.append(entries))

        await self._in_order(job)

    def _keep_instance(self) -> None:
        write_atomically(self._state / BEGUN_FILE, self.run_instance.encode())
        self._instance_is_kept = True

    async def checkpoint(self, checkpoint: Checkpoint, and_write: Callable[[], None]) -> None:
        """Keep a checkpoint and begin the ledger's next window; `and_write` goes before."""

        asked = time.monotonic()

        def job() -> None:
            self._with_room(and_write)
            self._with_room(self.ledger.close_window)
            self._with_room(lambda: self._store.save(checkpoint))
            self._with_room(lambda: self.ledger.open_window(checkpoint.round))

        with self._clock.phase("checkpoint", checkpoint.round - 1):
            await self._in_order(job)
        self.safe_since, self.checkpoint_seconds = asked, time.monotonic() - asked

    async def drop(self, client_id: str) -> None:
        """Keep for good that an operator has dropped a client."""
        self.dropped = sorted({*self.dropped, client_id})
        data = json.dumps(self.dropped).encode()
        await self._run(lambda: write_atomically(self._state / DROPPED_FILE, data))

    def close(self) -> None:
        """Finish what is being written and drop the rest."""
        self._closing.set()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self.ledger.close()

    async def _in_order(self, job: Callable[[], None]) -> None:
        """Do a job after those before it, unless one of them has failed: it builds on them."""

        def if_all_went_well() -> None:
            if self._failed:
                raise RunStopped("what came before could not be kept")
            self._failed = True  # unless this goes well
            job()
            self._failed = False

        await self._run(if_all_went_well)

    async def _run(self, job: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, job)

    def _with_room(self, write: Callable[[], None]) -> None:
        when_there_is_room(
            write, self._state, self._on_wait, go_on=lambda: not self._closing.is_set()
        )


def drop_journal(state: Path) -> None:
    """Forget what an earlier run left in a state folder."""
    for name in (CHECKPOINTS_FOLDER, LEDGER_FOLDER, SAMPLES_FOLDER):
        shutil.rmtree(state / name, ignore_errors=True)
    for name in (ADAPTER_FILE, BEGUN_FILE, DROPPED_FILE, SPEC_FILE):
        (state / name).unlink(missing_ok=True)
