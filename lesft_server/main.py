"""The command `lesft-server`."""

import asyncio
import logging
import sys

from lesft.settings import load_settings
from lesft_server.settings import ServerSettings

PROG = "lesft-server"


def main(argv: list[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; exits with 1 when it cannot start."""
    settings = load_settings(ServerSettings, PROG, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        _serve(settings)
    except KeyboardInterrupt:  # while torch loads; later a signal is a request to stop
        print(f"{PROG}: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _serve(settings: ServerSettings) -> None:
    # Only now: gRPC and torch take longer to load than --help may take.
    from lesft.errors import LesftError
    from lesft_server.server import serve

    try:
        asyncio.run(serve(settings))
    except (LesftError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
