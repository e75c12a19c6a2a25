"""Settings of the commands of `lesft-server` beside serving."""

from typing import ClassVar

from pydantic_settings import SettingsConfigDict

from lesft.identity import command_settings
from lesft.identity.settings import Service
from lesft.settings import ServiceSettings


class _Own(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="LESFT_SERVER_")

    service: ClassVar[Service] = "server"


class EnrollSettings(command_settings.EnrollSettings, _Own):
    """Invite a client: prints a token for its `lesft-client enroll`, which works once."""


class RevokeSettings(command_settings.RevokeSettings, _Own):
    """Shut a client out, at once and in mid-run; another enrolment lets it in again."""


class TokenSettings(command_settings.TokenSettings, _Own):
    """Make a token for the control API, for a person or a program, or revoke one."""


class AccessSettings(command_settings.AccessSettings, _Own):
    """List who may do what: clients, invitations and access tokens."""


class StatusSettings(command_settings.StatusSettings, _Own):
    """Look at the server from any machine: exit status 0 when it works, 4 when it waits."""


class KeySettings(command_settings.KeySettings, _Own):
    """Print the public key of the server's receipts, for the aggregator's --server-key."""
