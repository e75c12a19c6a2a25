"""What the client shows while it works: one bar on a terminal, a line per round elsewhere."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from lesft_client.status import Status

log = logging.getLogger(__name__)

_WAIT_SECONDS = 10
"""A wait that is over sooner is not worth a line."""


class ProgressDisplay:
    """Shows phases and rounds of one status."""

    def __init__(
        self,
        status: Status,
        bar: bool,
        note: Callable[[str], None] = lambda line: None,
        as_log: bool = False,
    ) -> None:
        """`note` gets each line, whether it is printed or the bar shows it.

        With `as_log` lines are logged instead, and nothing is shown.
        """
        self._as_log = as_log
        self._status = status
        self._note = note
        self._bar = bar and not as_log
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._waiting_since = 0.0
        self._waiting_said = False

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """Show a phase of `total` steps while the block runs; `advance` counts them."""
        self._status.phase = name
        if not self._bar:
            self.say(f"{name} ...")
            yield
            return
        self._note(f"{name} ...")
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as self._progress:
            self._task = self._progress.add_task(name, total=total, figures="")
            yield

    def advance(self, done: int | None = None) -> None:
        """Count one step of the phase, or say how many are done."""
        if self._progress is not None and self._task is not None:
            if done is None:
                self._progress.advance(self._task)
            else:
                self._progress.update(self._task, completed=done)

    def round_done(self) -> None:
        """Show the figures of the round that just ended."""
        body = self._status.body()
        figures = (
            f"loss {body.loss or math.nan:.4f}  {body.tokens_per_second:.0f} tokens/s  "
            f"up {decimal(body.bytes_up)}  down {decimal(body.bytes_down)}"
        )
        left = f"{body.seconds_left:.0f} s left" if body.seconds_left is not None else ""
        line = f"round {body.round}/{body.rounds}  {figures}  {left}"
        if self._progress is not None and self._task is not None:
            self._note(line)
            self._progress.update(self._task, completed=body.round, figures=figures)
            return
        self.say(line)

    def waiting(self, waiting_for: str) -> None:
        """Note what the run waits for; said in a line of its own once it has lasted a while."""
        now = time.monotonic()
        if waiting_for != self._status.waiting_for:
            self._status.waiting_for = waiting_for
            self._waiting_since = now
            self._waiting_said = False
        elif waiting_for and not self._waiting_said and now - self._waiting_since > _WAIT_SECONDS:
            self._waiting_said = True
            self.say(f"waiting for {waiting_for}")

    def say(self, message: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._as_log:
            log.info("%s", message)
            return
        self._note(message)
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)
