"""The settings of `lesft-client plan`; those that it shares with `train` mean the same."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from lesft_client.connection_settings import ConnectionSettings
from lesft_client.log_settings import ClientLogSettings
from lesft_client.settings import DataSettings, Precision


class PlanSettings(DataSettings, ConnectionSettings, ClientLogSettings):
    """Measure this device and its link to the server, and say where to cut the model."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    server: str = Field(description="HOST:PORT of the central server.")
    model: str = Field(
        description="Folder with the tokenizer, with or without weights, or a hub id."
    )
    output: Path = Field(
        Path("plan"), description="Folder for plan.json, plan.md and plan.png; made where needed."
    )
    device: str = Field("auto", description="torch device; auto takes CUDA when there is one.")
    precision: Precision = Field(
        "fp32", description="That of the training that is planned; see lesft-client train."
    )
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 leaves its default.")
    gradient_checkpointing: bool = Field(
        False, description="Plan for a client that computes each layer's inside again."
    )
    in_flight: int = Field(
        0,
        ge=0,
        description="Micro-batches sent ahead of their gradients; 0 takes the whole window.",
    )
    max_length: int = Field(
        0, ge=0, description="Skip samples of more tokens; 0 takes the run's own limit."
    )
    memory_mib: int = Field(
        0, ge=0, description="Memory that the client may use, in MiB; 0 takes what is free now."
    )
    allow_shallower: bool = Field(
        False,
        description="Recommend also cuts that leave less than a quarter of the layers here, whose "
        "activations show the server more of the text.",
    )
    apply: bool = Field(
        False,
        description="Ask the server to begin its run with what is recommended; needs its "
        "--accept-plans.",
    )
    patience_seconds: float = Field(
        60, gt=0, description="How long to go on trying a server that does not answer."
    )
