"""The `lesft-aggregator` command."""

import asyncio
import logging
import sys

from lesft.settings import load_settings
from lesft_aggregator.settings import AggregatorSettings

PROG = "lesft-aggregator"


def main(argv: list[str] | None = None) -> None:
    """Run the aggregator until SIGTERM or SIGINT; exits with 1 when it cannot run on."""
    settings = load_settings(AggregatorSettings, PROG, sys.argv[1:] if argv is None else argv)
    # Only now: gRPC, SQLAlchemy and FastAPI take longer to load than --help may take.
    from lesft.errors import LesftError
    from lesft_aggregator.server import serve

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        asyncio.run(serve(settings, announce=lambda line: print(f"{PROG} {line}", flush=True)))
    except (LesftError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
