"""The settings by which a service proves who it is, shared by server and aggregator."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lesft.settings import ServiceSettings

Service = Literal["server", "aggregator"]
"""The two that clients enrol with."""


class SecuritySettings(ServiceSettings):
    """Where a service listens, and how it proves who it is."""

    state: Path = Field(description="Folder for what the service keeps.")
    listen: str = Field(description="HOST:PORT of the gRPC service.")
    control: str = Field(description="HOST:PORT of the control API.")
    tls: Literal["auto", "on"] = Field(
        "auto",
        description="Encrypt, and let in those only who enrolled; auto does so as soon as one of "
        "the two addresses is beyond this machine.",
    )
    insecure: bool = Field(
        False,
        description="Listen beyond this machine without encryption: anyone on the way can read and "
        "change everything, and anyone who gets there can join and give orders.",
    )
    public_host: str = Field(
        "",
        pattern=r"^[^\s:\[\]/]*$|^[0-9a-fA-F:]+$",
        description="Name or address by which others reach this machine, for enrolment tokens and "
        "the certificate; by default those of --listen and --control.",
    )
    certificate_hours: float = Field(
        168,
        gt=0,
        le=24 * 366,
        description="How long a client's certificate lasts; it is renewed by itself half-way.",
    )
    certificate: Path | None = Field(
        None, description="PEM file of a certificate of your own in place of this service's."
    )
    certificate_key: Path | None = Field(None, description="PEM file of its private key.")
    client_authority: Path | None = Field(
        None,
        description="PEM file of the authority that your clients' certificates are of; their "
        "common name is the client's id.",
    )

    @model_validator(mode="after")
    def _encryption_is_no_contradiction(self) -> "SecuritySettings":
        if self.insecure and self.tls == "on":
            raise ValueError("--tls on and --insecure contradict each other: leave one out")
        own = (self.certificate, self.certificate_key, self.client_authority)
        if any(own) and not all(own):
            raise ValueError(
                "--certificate, --certificate-key and --client-authority belong together: give all "
                "three, or none for an authority that the service makes itself"
            )
        return self
