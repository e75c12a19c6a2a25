"""The commands that server and aggregator have beside serving."""

from lesft.commands import Command

_COMMANDS = "lesft.identity.commands"


def access_commands(package: str) -> tuple[Command, ...]:
    """Who may do what at a service, and a look at it; `package` has its settings and status."""
    settings = f"{package}.command_settings"
    return (
        Command(
            "status",
            "look at a service from any machine, with an access token",
            f"{settings}:StatusSettings",
            f"{package}.status:status",
        ),
        Command(
            "enroll",
            "invite a client: make the token that it enrols with",
            f"{settings}:EnrollSettings",
            f"{_COMMANDS}:enroll",
        ),
        Command(
            "revoke",
            "shut a client out, in mid-run too",
            f"{settings}:RevokeSettings",
            f"{_COMMANDS}:revoke",
        ),
        Command(
            "token",
            "make or revoke a token for the control API",
            f"{settings}:TokenSettings",
            f"{_COMMANDS}:token",
        ),
        Command(
            "access",
            "list who may do what",
            f"{settings}:AccessSettings",
            f"{_COMMANDS}:access",
        ),
    )
