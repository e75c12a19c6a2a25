"""How a client's commands connect to server and aggregator, and listen themselves."""

from pathlib import Path

from pydantic import Field, model_validator

from lesft.settings import ServiceSettings

IDENTITY_FOLDER = Path("~/.config/lesft/identity")


class ConnectionSettings(ServiceSettings):
    """Who this device is, and whether it insists on encryption."""

    identity: Path = Field(
        IDENTITY_FOLDER, description="Folder with what lesft-client enroll has left."
    )
    insecure: bool = Field(
        False,
        description="Connect beyond this machine without encryption: anyone on the way can read "
        "and change everything.",
    )
    certificate: Path | None = Field(
        None, description="PEM file of a certificate of your site, in place of an enrolment."
    )
    certificate_key: Path | None = Field(None, description="PEM file of its private key.")
    authority: Path | None = Field(
        None, description="PEM file of the authority that the services' certificates are of."
    )

    @model_validator(mode="after")
    def _certificates_are_whole(self) -> "ConnectionSettings":
        given = (self.certificate, self.certificate_key, self.authority)
        if any(given) and not all(given):
            raise ValueError(
                "--certificate, --certificate-key and --authority belong together: give all three, "
                "or none"
            )
        if any(given) and self.insecure:
            raise ValueError("--certificate and --insecure contradict each other: leave one out")
        return self


class ListenerSettings(ServiceSettings):
    """How this device's own HTTP listener is guarded where it is reached from elsewhere."""

    listener_certificate: Path | None = Field(
        None, description="PEM file of a certificate for this device's own listener, for HTTPS."
    )
    listener_key: Path | None = Field(None, description="PEM file of its private key.")
    listener_insecure: bool = Field(
        False,
        description="Let this device's own listener be reached from elsewhere without encryption.",
    )

    @model_validator(mode="after")
    def _listener_has_its_key(self) -> "ListenerSettings":
        if (self.listener_certificate is None) != (self.listener_key is None):
            raise ValueError("--listener-certificate and --listener-key belong together")
        return self
