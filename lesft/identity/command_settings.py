"""Settings of the commands by which an operator says who may do what.

Each service has its own of each, with its name and its environment variables.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from lesft.identity.settings import Service
from lesft.settings import ServiceSettings


class StateSettings(ServiceSettings):
    """Of which service on this machine."""

    service: ClassVar[Service]
    state: Path = Field(description="Folder of the service, as it was started with.")


class EnrollSettings(StateSettings):
    """Invite a client: prints a token for its `lesft-client enroll`, which works once."""

    client: CliPositionalArg[str] = Field(
        description="The client's id.", pattern=r"^[A-Za-z0-9._-]{1,64}$"
    )
    hours: float = Field(24, gt=0, le=24 * 366, description="How long the token can be used.")
    host: str = Field(
        "",
        description="Name or address by which the client reaches this machine; by default the "
        "service's --public-host, or those of its --listen and --control.",
    )
    output: Path | None = Field(
        None, description="File for the token, for its owner's eyes only; none prints it."
    )


class RevokeSettings(StateSettings):
    """Shut a client out, at once and in mid-run; another enrolment lets it in again."""

    client: CliPositionalArg[str] = Field(description="The client's id.")
    undo: bool = Field(
        False,
        description="Take that back. With the service's own authority it does not bring back "
        "certificates: enrol the client again instead.",
    )


class TokenSettings(StateSettings):
    """Make a token for the control API, for a person or a program, or revoke one."""

    name: CliPositionalArg[str] = Field(
        description="Whose it is.", pattern=r"^[A-Za-z0-9._-]{1,64}$"
    )
    role: Literal["viewer", "operator"] = Field(
        "viewer", description="viewer may look at everything, operator may also give orders."
    )
    days: float = Field(90, gt=0, le=3660, description="How long it can be used.")
    host: str = Field(
        "", description="As of enroll: by which name or address this machine is reached."
    )
    output: Path | None = Field(
        None, description="File for the token, for its owner's eyes only; none prints it."
    )
    revoke: bool = Field(False, description="Revoke that one instead, at once.")


class AccessSettings(StateSettings):
    """List who may do what: clients, invitations and access tokens."""


class KeySettings(StateSettings):
    """Print the public key of a server's receipts."""


class StatusSettings(ServiceSettings):
    """Look at a service from any machine: exit status 0 when it works, 4 when it waits."""

    service: ClassVar[Service]
    token: str = Field(
        "",
        description="File with an access token, which also says where the service is; - reads it "
        "from standard input.",
    )
    control: str = Field(
        "",
        description="HOST:PORT of the control API in place of the token's, or of a service on this "
        "machine that needs none.",
    )
    authority: Path | None = Field(
        None, description="PEM file of the authority of a site's own certificates."
    )
    output: Literal["text", "json"] = Field("text", description="For people or for programs.")
