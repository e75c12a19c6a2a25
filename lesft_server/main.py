"""The command `lesft-server`."""

from lesft.commands import Command, Program
from lesft.identity.program import access_commands
from lesft.openmp import sleep_soon

PROGRAM = Program(
    "lesft-server",
    "The central server of LESFT: it runs the rest of the model for edge clients.",
    (
        Command(
            "serve",
            "load the model and serve",
            "lesft_server.settings:ServerSettings",
            "lesft_server.server:run",
        ),
        *access_commands("lesft_server"),
        Command(
            "key",
            "print the public key by which an aggregator checks this server's receipts",
            "lesft_server.command_settings:KeySettings",
            "lesft.identity.commands:key",
        ),
    ),
    default="serve",
    log_format="%(asctime)s %(message)s",
    log_dates="%H:%M:%S",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    sleep_soon()
    PROGRAM.run(argv)
