"""The command `lesft-server`."""

import asyncio
import logging
import sys

from lesft.errors import LesftError
from lesft.settings import load_settings
from lesft_server.settings import ServerSettings


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    settings = load_settings(ServerSettings, "lesft-server", sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # torch waits until the options are parsed: --help must not load it.
    from lesft_server.server import serve

    try:
        asyncio.run(serve(settings))
    except LesftError as error:
        print(f"lesft-server: {error}", file=sys.stderr)
        raise SystemExit(1) from None
