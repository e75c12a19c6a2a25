"""The settings of `lesft-client train`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from lesft.spec import Encoding, LoraSpec, RunOptions
from lesft_client.connection_settings import ConnectionSettings, ListenerSettings
from lesft_client.log_settings import ClientLogSettings
from lesft_client.settings import DataSettings, Precision


class RequiredLora(LoraSpec):
    """Refuse a run with other adapters; what is not given here is the server's."""


class OwnRun(RunOptions):
    """The run of a client without a server (--local)."""

    clients: int = Field(1, ge=1, description="Number of clients that average their adapters.")


class TrainSettings(DataSettings, ConnectionSettings, ListenerSettings, ClientLogSettings):
    """Fine-tune with others: LESFT's edge client keeps the text and the first decoder layers."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    server: str = Field("", description="HOST:PORT of the central server, if there is one.")
    aggregator: str = Field(
        "", description="HOST:PORT of the aggregation server, where the run averages adapters."
    )
    model: str = Field(
        description="Folder with the tokenizer, with or without weights, or a hub id."
    )
    state: Path = Field(description="Folder for what this client keeps.")
    local: bool = Field(
        False,
        description="Hold and train the whole model here, without a server; --run.* says how.",
    )
    client_id: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]{0,64}$",
        description="Name of this client, unique in the run; empty takes that of its certificate, "
        "or the host's.",
    )
    control: str = Field("127.0.0.1:8050", description="HOST:PORT of the local control API.")
    control_token: Path | None = Field(
        None, description="File with a token that users of the control API must bring."
    )
    enrol_with: tuple[Path, ...] = Field(
        (),
        description="Files with enrolment tokens, to enrol with where this device has not yet: for "
        "installations that do so by themselves.",
    )
    weights: Literal["auto", "local", "server"] = Field(
        "auto", description="Front weights: from --model where it has any, or from the server."
    )
    cache: Path = Field(
        Path("~/.cache/lesft"), description="Folder for front weights fetched from servers."
    )
    device: str = Field("auto", description="torch device; auto takes CUDA when there is one.")
    precision: Precision = Field(
        "fp32",
        description="fp32, or bf16 weights and autocast with adapters in fp32; int8 and int4 keep "
        "the front's frozen weights in 8 and 4 bits.",
    )
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 leaves its default.")
    gradient_checkpointing: bool = Field(
        False,
        description="Compute each layer's inside again in the backward pass instead of keeping "
        "it: less memory, more time, the same result.",
    )
    in_flight: int = Field(
        0,
        ge=0,
        description="Micro-batches sent ahead of their gradients; 0 takes the whole window.",
    )
    max_length: int = Field(
        0, ge=0, description="Skip samples of more tokens; 0 takes the run's own limit."
    )
    fresh: bool = Field(
        False, description="Drop what an earlier run left in --state and start anew."
    )
    patience_seconds: float = Field(
        60, gt=0, description="How long to go on trying a service that has never answered."
    )
    reconnect_seconds: float = Field(
        3600, gt=0, description="How long to go on trying a service that is gone in mid-run."
    )
    stall_seconds: float = Field(
        60,
        gt=0,
        description="A connection that falls silent for so long is given up for a new one.",
    )
    progress: Literal["auto", "bar", "lines"] = Field(
        "auto", description="A progress bar, or a line per round; auto asks the terminal."
    )
    cut_layer: int | None = Field(
        None,
        ge=1,
        description="Refuse a run with another cut layer; by default any will do. With local, "
        "where the model is taken apart.",
    )
    activation_encoding: Encoding | None = Field(
        None, description="Refuse a run with another encoding of activations."
    )
    gradient_encoding: Encoding | None = Field(
        None, description="Refuse a run with another encoding of gradients."
    )
    lora: RequiredLora | None = None
    run: OwnRun | None = None

    @model_validator(mode="after")
    def _says_where_the_back_is(self) -> "TrainSettings":
        if not self.local:
            if not self.server:
                raise ValueError("--server HOST:PORT is needed, or --local to train without one")
            if self.run is not None:
                raise ValueError("--run.* is for --local: with a server, the run is the server's")
            return self
        if self.server:
            raise ValueError("--local trains without a server: leave --server out")
        if self.run is None:
            raise ValueError("--local needs to know the run: give --run.rounds at least")
        if self.lora or self.activation_encoding or self.gradient_encoding:
            raise ValueError(
                "--lora.* and encodings are what to refuse a server's run for; with --local, set "
                "--run.lora.*"
            )
        if self.precision in ("int8", "int4"):
            raise ValueError(
                f"--precision {self.precision} is for the front of a split run: with --local, take "
                "bf16"
            )
        if not self.run.train_front:
            raise ValueError(
                "--no-run.train-front is for split runs: here nothing stands between front and back"
            )
        if self.run.clients > 1 and self.run.aggregate and not self.aggregator:
            raise ValueError(
                f"--aggregator is needed: {self.run.clients} clients average their adapters; else "
                "set --run.clients 1 or --no-run.aggregate"
            )
        return self
