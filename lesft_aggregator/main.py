"""The command `lesft-aggregator`."""

from lesft.commands import Command, Program
from lesft.identity.program import access_commands

PROGRAM = Program(
    "lesft-aggregator",
    "The aggregation server of LESFT: it averages the clients' adapters.",
    (
        Command(
            "serve",
            "average the clients' adapters, round by round",
            "lesft_aggregator.settings:AggregatorSettings",
            "lesft_aggregator.server:run",
        ),
        *access_commands("lesft_aggregator"),
    ),
    default="serve",
    log_format="%(asctime)s %(levelname)s %(message)s",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    PROGRAM.run(argv)
