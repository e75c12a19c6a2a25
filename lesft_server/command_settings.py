"""Settings of the commands of `lesft-server` beside serving."""

from typing import ClassVar

from pydantic_settings import SettingsConfigDict

from lesft.identity import command_settings
from lesft.identity.settings import Service
from lesft.settings import ServiceSettings


class _Own(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="LESFT_SERVER_")

    service: ClassVar[Service] = "server"


class EnrollSettings(_Own, command_settings.EnrollSettings):
    """Invite a client: prints a token for its `lesft-client enroll`, which works once."""


class RevokeSettings(_Own, command_settings.RevokeSettings):
    """Shut a client out, at once and in mid-run; another enrolment lets it in again."""


class TokenSettings(_Own, command_settings.TokenSettings):
    """Make a token for the control API, for a person or a program, or revoke one."""


class AccessSettings(_Own, command_settings.AccessSettings):
    """List who may do what: clients, invitations and access tokens."""


class StatusSettings(_Own, command_settings.StatusSettings):
    """Look at the server from any machine: exit status 0 when it works, 4 when it waits."""


class KeySettings(_Own, command_settings.KeySettings):
    """Print the public key of the server's receipts, for the aggregator's --server-key."""
