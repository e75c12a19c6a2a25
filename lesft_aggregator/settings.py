"""The aggregator's settings."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from lesft.identity.settings import SecuritySettings
from lesft.limit_settings import CallLimits
from lesft.logs import LogSettings


class AggregatorSettings(SecuritySettings, CallLimits, LogSettings):
    """LESFT's aggregation server: averages the clients' adapters, round by round."""

    model_config = SettingsConfigDict(env_prefix="LESFT_AGGREGATOR_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    listen: str = Field("127.0.0.1:50052", description="HOST:PORT of the gRPC service.")
    control: str = Field("127.0.0.1:8052", description="HOST:PORT of the control API.")
    state: Path = Field(description="Folder for submissions, averaged adapters and the database.")
    fresh: bool = Field(
        False, description="Drop what an earlier run left in --state and start anew."
    )
    run_id: str = Field("lesft", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name of the run.")
    clients: int = Field(ge=1, description="Number of clients that take part in each round.")
    quorum: int = Field(
        0, ge=0, description="Clients that suffice once the deadline has passed; 0 means all."
    )
    deadline_seconds: float = Field(
        0,
        ge=0,
        description="Seconds from a round's first submission until the quorum suffices; 0: never.",
    )
    server_key: str = Field(
        "",
        description="Public key of the central server, as lesft-server key prints it: clients then "
        "count for what it vouches for, and for nothing else.",
    )
    heartbeat_seconds: float = Field(
        5, gt=0, description="How often a client that waits hears that the aggregator is there."
    )
    stall_seconds: float = Field(
        300,
        gt=0,
        description="A submission of which nothing comes for so long loses its room to the others; "
        "one piece of 1 MiB may take its time.",
    )
    max_submission_mib: int = Field(
        256,
        ge=1,
        description="Largest adapter, and room for all that are being received at once, in MiB.",
    )
    max_adapter_norm: float = Field(
        0, ge=0, description="Largest Frobenius norm of a client's whole adapter; 0: no limit."
    )
    norm_policy: Literal["refuse", "clip"] = Field(
        "refuse", description="Adapters above that norm are refused, or scaled down to it."
    )

    @model_validator(mode="after")
    def _quorum_makes_sense(self) -> "AggregatorSettings":
        if self.quorum > self.clients:
            raise ValueError(
                f"--quorum must be at most --clients ({self.clients}), got {self.quorum}"
            )
        if 0 < self.quorum < self.clients and self.deadline_seconds == 0:
            raise ValueError(
                f"--quorum {self.quorum} only counts after a deadline: set --deadline-seconds"
            )
        return self

    @property
    def required(self) -> int:
        """Clients that suffice once the deadline has passed."""
        return self.quorum or self.clients
