"""The command `lesft-aggregator`."""

from lesft.commands import Command, Program

_SETTINGS = "lesft_aggregator.command_settings"
_COMMANDS = "lesft.identity.commands"

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
        Command(
            "status",
            "look at a service from any machine, with an access token",
            f"{_SETTINGS}:StatusSettings",
            "lesft_aggregator.status:status",
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
            "access",
            "list who may do what",
            f"{_SETTINGS}:AccessSettings",
            f"{_COMMANDS}:access",
        ),
    ),
    default="serve",
    log_format="%(asctime)s %(levelname)s %(message)s",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    PROGRAM.run(argv)
