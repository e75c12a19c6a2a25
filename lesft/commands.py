"""A program of several commands: which one was asked for, its help, its errors and exit statuses.

A command's own modules are loaded when it runs, so that --help answers at once.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from lesft.logs import LogSettings, configure_logs
from lesft.settings import load_settings
from lesft.tracing import start_tracing, stop_tracing

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One command. What it needs is loaded when it runs, and its settings before all else."""

    name: str
    summary: str
    settings: str
    """Its `ServiceSettings`, as `module:name`."""
    run: str
    """A function of these settings, as `module:name`; text that it returns is printed."""


@dataclass(frozen=True)
class Program:
    """A console program.

    `when_interrupted` is what it says when its user stops it, and `exit_when_stopped` its exit
    status when a run ended early because of another party.
    """

    name: str
    about: str
    commands: Sequence[Command]
    default: str = ""
    """The command that options without a command's name are for."""
    when_interrupted: str = "stopped"
    exit_when_stopped: int = EXIT_FAILED
    log_format: str = "%(message)s"
    log_dates: str | None = None
    """How times are written in `log_format`; None is logging's own way."""

    @property
    def usage(self) -> str:
        """What --help prints."""
        width = max(len(command.name) for command in self.commands) + 2
        lines = [f"  {command.name:{width}}{command.summary}" for command in self.commands]
        return "\n".join(
            [
                f"usage: {self.name} COMMAND [OPTIONS]",
                "",
                self.about,
                "",
                "commands:",
                *lines,
                "",
                f"{self.name} COMMAND --help lists the command's options.",
                "",
            ]
        )

    def run(self, argv: list[str] | None = None) -> None:
        """Run the command of `argv`, by default the process's own; exits when that fails."""
        arguments = sys.argv[1:] if argv is None else argv
        if self.default and (not arguments or arguments[0].startswith("-")):
            arguments = [self.default, *arguments]
        name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
        if name in ("-h", "--help"):
            print(self.usage, end="")
            return
        chosen = next((command for command in self.commands if command.name == name), None)
        if chosen is None:
            print(f"{self.name}: unknown command {name!r}\n\n{self.usage}", end="", file=sys.stderr)
            raise SystemExit(EXIT_USAGE)
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup sets it
                signal.signal(signum, _interrupt)
        try:
            self._run(chosen, rest)
        except KeyboardInterrupt:
            self._fail(self.when_interrupted, EXIT_INTERRUPTED)

    def _run(self, command: Command, argv: list[str]) -> None:
        is_default = command.name == self.default
        prog = self.name if is_default else f"{self.name} {command.name}"
        more = self._others() if is_default else ""
        settings = load_settings(load(command.settings), prog, argv, more)
        if isinstance(settings, LogSettings):
            configure_logs(settings, self.name, self.log_format, self.log_dates)
            start_tracing(self.name)
        # gRPC's own log holds what strangers send, as it came; it looks at this when it is loaded.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        # Only now: gRPC takes longer to load than --help may take.
        from lesft.errors import LesftError, RunStopped

        try:
            text = load(command.run)(settings)
            if text is not None:
                print(text)
        except RunStopped as error:
            self._fail(error, self.exit_when_stopped)
        except (LesftError, OSError) as error:
            self._fail(error, EXIT_FAILED)
        finally:
            stop_tracing()

    def _others(self) -> str:
        """The commands beside the default one, to end its help."""
        others = [command for command in self.commands if command.name != self.default]
        width = max(len(command.name) for command in others) + 2
        lines = [f"  {command.name:{width}}{command.summary}" for command in others]
        head = f"\n\nother commands ({self.name} COMMAND --help lists their options):\n"
        return head + "\n".join(lines)

    def _fail(self, reason: Exception | str, status: int) -> None:
        print(f"{self.name}: {reason}", file=sys.stderr)
        raise SystemExit(status) from None


def say(line: str) -> None:
    """A line for who runs the command, beside its output."""
    print(line, file=sys.stderr, flush=True)


def load(path: str) -> Any:
    """What `module:name` stands for."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
