"""What is shown while questions are answered: a bar on a terminal, elsewhere a line now and then.

Only counts, never a question or an answer.
"""

import asyncio
import sys
import time
from abc import ABC, abstractmethod
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_SECONDS = 10.0

P = TypeVar("P", bound="CountedProgress")


class CountedProgress(ABC):
    """How many questions are done, on standard error; a subclass has the other figures."""

    def __init__(self, doing: str, total: int, done: int, bar: bool) -> None:
        """`done` counts what an earlier run did."""
        self._total = total
        self._done = self._begun_with = done
        self._started = time.monotonic()
        self._line_said = 0.0
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        if bar:
            self._progress = Progress(
                TextColumn(f"[bold]{doing}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total, completed=done, figures="")

    def __enter__(self: P) -> P:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    @abstractmethod
    def figures(self, seconds: float) -> str:
        """What there is to say `seconds` (more than 0) after the start, besides done and left."""

    def count(self) -> None:
        """One more question is done."""
        self._done += 1
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, figures=self._all_figures())

    def say_line_when_due(self) -> None:
        """A line, where there is no bar and none was said for ten seconds."""
        seconds = self.seconds()
        if self._progress is None and seconds - self._line_said >= LINE_SECONDS:
            self._line_said = seconds
            self._say_line()

    async def keep_ticking(self) -> None:
        """A line every ten seconds, where there is no bar, until cancelled."""
        while True:
            await asyncio.sleep(LINE_SECONDS)
            if self._progress is None:
                self._say_line()

    def say(self, message: str) -> None:
        """A line of its own, above the bar where there is one."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def _say_line(self) -> None:
        self.say(f"{self._done}/{self._total} questions  {self._all_figures()}")

    def _all_figures(self) -> str:
        seconds = max(self.seconds(), 0.001)
        done = self._done - self._begun_with
        left = f"{(self._total - self._done) * seconds / done:.0f} s left" if done else ""
        return f"{self.figures(seconds)}  {left}"


def wants_bar(progress: str) -> bool:
    """Whether the setting `--progress` asks for a bar: `bar`, or `auto` on a terminal."""
    return progress == "bar" or (progress == "auto" and sys.stderr.isatty())
