"""The command `lesft-client`."""

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType

USAGE = """\
usage: lesft-client COMMAND [OPTIONS]

The edge client of LESFT: it keeps the text and runs the first layers of the model.

commands:
  train   fine-tune together with other clients
  data    write the samples of a data source as JSONL, to look at them

lesft-client COMMAND --help lists the command's options.
"""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED_BY_OTHERS = 3
"""The run ended early because of another party; tells a cause from its consequences."""

EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return
    commands = {"train": _train, "data": _data}
    if command not in commands:
        print(f"lesft-client: unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run(commands[command](rest))
    except KeyboardInterrupt:
        _fail("stopped", EXIT_INTERRUPTED)


def _run(command: Callable[[], None]) -> None:
    # Only now: gRPC takes longer to load than --help may take.
    from lesft.errors import LesftError, RunStopped

    try:
        command()
    except RunStopped as error:
        _fail(error, EXIT_STOPPED_BY_OTHERS)
    except (LesftError, OSError) as error:
        _fail(error, EXIT_FAILED)


def _fail(reason: Exception | str, status: int) -> None:
    print(f"lesft-client: {reason}", file=sys.stderr)
    raise SystemExit(status)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# Each command reads its options, and returns what is to be run with them.


def _train(argv: list[str]) -> Callable[[], None]:
    from lesft.settings import load_settings
    from lesft_client.settings import TrainSettings

    settings = load_settings(TrainSettings, "lesft-client train", argv)

    def run() -> None:
        from lesft_client.train import TrainCommand

        TrainCommand(settings).run()

    return run


def _data(argv: list[str]) -> Callable[[], None]:
    from lesft.settings import load_settings
    from lesft_client.settings import ExportDataSettings

    settings = load_settings(ExportDataSettings, "lesft-client data", argv)

    def run() -> None:
        from lesft_client.data_command import export_data

        export_data(settings)

    return run
