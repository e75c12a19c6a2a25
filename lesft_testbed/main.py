"""The command `lesft-testbed`."""

import signal
import sys
from types import FrameType

from lesft.errors import LesftError
from lesft.settings import load_settings

USAGE = """\
usage: lesft-testbed COMMAND [OPTIONS]

LESFT on one machine: every service its own process, on its own sockets.

commands:
  run     fine-tune a model with a server, an aggregator and clients; report on it
  chaos   kill services and cut links during a run; the adapters must come out the same
  model   make sure that the small default model is there and print its folder

lesft-testbed COMMAND --help lists the command's options.
"""

EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return
    commands = {"run": _run, "chaos": _chaos, "model": _model}
    if command not in commands:
        print(f"lesft-testbed: unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        raise SystemExit(2)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _interrupt)
    try:
        commands[command](rest)
    except LesftError as error:
        print(f"lesft-testbed: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("lesft-testbed: stopped; all services were ended", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# The commands' own imports wait until their options are parsed.


def _run(argv: list[str]) -> None:
    from lesft_testbed.settings import RunSettings

    settings = load_settings(RunSettings, "lesft-testbed run", argv)
    from lesft_testbed.run import run_testbed

    print(run_testbed(settings))


def _chaos(argv: list[str]) -> None:
    from lesft_testbed.settings import ChaosSettings

    settings = load_settings(ChaosSettings, "lesft-testbed chaos", argv)
    from lesft_testbed.chaos import run_chaos

    print(run_chaos(settings, lambda line: print(line, file=sys.stderr, flush=True)))


def _model(argv: list[str]) -> None:
    from lesft_testbed.settings import ModelSettings

    settings = load_settings(ModelSettings, "lesft-testbed model", argv)
    from lesft_testbed.default_model import default_model

    print(default_model(settings.cache, lambda line: print(line, file=sys.stderr)))
