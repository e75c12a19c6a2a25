"""What the testbed shows while it runs: one live table of all services, or a line per event."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lesft_testbed.watch import ServiceView


class Display:
    """Shows rounds and services; `table` chooses the live table over lines."""

    def __init__(self, table: bool) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False) if table else None
        self._states: dict[str, str] = {}
        self._headline = "starting"
        self._start = time.monotonic()
        self._first_round_at: float | None = None

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, message: str) -> None:
        """A line that stays."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def rounds_done(self, records: Sequence[dict[str, Any]], rounds: int) -> None:
        """Show the newly finished rounds."""
        for record in records:
            now = time.monotonic()
            if self._first_round_at is None:
                self._first_round_at = now - record["seconds"]
            done = record["round"] + 1
            left = (now - self._first_round_at) / done * (rounds - done)
            self._headline = (
                f"round {done}/{rounds}  loss {record['loss']:.4f}  "
                f"-log P per token {record['nll']:.4f}  "
                f"{record['seconds']:.1f} s a round  {left:.0f} s left"
            )
            if self._live is None:
                self.say(self._headline)

    def services(self, views: Sequence[ServiceView]) -> None:
        """Show what the services are doing."""
        if self._live is not None:
            elapsed = f"  {time.monotonic() - self._start:.0f} s"
            self._live.update(
                Group(Text(self._headline + elapsed, style="bold"), _table(views)), refresh=True
            )
            return
        for view in views:
            if self._states.get(view.name) != view.state:
                self._states[view.name] = view.state
                self.say(f"{view.name}: {view.state}")


def _table(views: Sequence[ServiceView]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("service")
    table.add_column("state", min_width=26)
    for name in ("round", "loss", "tokens/s", "up", "down", "memory"):
        table.add_column(name, justify="right", min_width=8)
    for view in views:
        table.add_row(
            view.name,
            view.state,
            "" if view.round is None else str(view.round),
            "" if view.loss is None else f"{view.loss:.4f}",
            "" if view.tokens_per_second is None else f"{view.tokens_per_second:.0f}",
            "" if view.bytes_up is None else decimal(view.bytes_up),
            "" if view.bytes_down is None else decimal(view.bytes_down),
            decimal(view.memory_bytes) if view.memory_bytes else "",
        )
    return table
