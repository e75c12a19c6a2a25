"""The command `lesft-server`."""

from lesft.commands import Command, Program

_SETTINGS = "lesft_server.command_settings"
_COMMANDS = "lesft.identity.commands"

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
        Command(
            "status",
            "look at a service from any machine, with an access token",
            f"{_SETTINGS}:StatusSettings",
            "lesft_server.status:status",
        ),
        Command(
            "enroll",
            "invite a client: make the token that it enrols with",
            f"{_SETTINGS}:EnrollSettings",
            f"{_COMMANDS}:enroll",
        ),
        Command(
            "revoke",
            "shut a client out, in mid-run too",
            f"{_SETTINGS}:RevokeSettings",
            f"{_COMMANDS}:revoke",
        ),
        Command(
            "token",
            "make or revoke a token for the control API",
            f"{_SETTINGS}:TokenSettings",
            f"{_COMMANDS}:token",
        ),
        Command(
            "key",
            "print the public key by which an aggregator checks this server's receipts",
            f"{_SETTINGS}:KeySettings",
            f"{_COMMANDS}:key",
        ),
        Command(
            "access",
            "list who may do what",
            f"{_SETTINGS}:AccessSettings",
            f"{_COMMANDS}:access",
        ),
    ),
    default="serve",
    log_format="%(asctime)s %(message)s",
    log_dates="%H:%M:%S",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    PROGRAM.run(argv)
