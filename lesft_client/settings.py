"""The client's settings, one model per command."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from lesft.settings import ServiceSettings
from lesft.spec import Encoding, LoraSpec


class DataSettings(ServiceSettings):
    """Which samples the client uses."""

    data: str = Field(
        description="gsm8k, commonsense_qa, aqua_rat, wordproblems, a JSONL file or a data folder."
    )
    samples: int = Field(0, ge=0, description="Samples to train on; 0 takes the whole share.")
    held_out: int = Field(
        0, ge=0, description="Held-out samples to score before and after training; 0 scores none."
    )
    share: str = Field(
        "1/1",
        pattern=r"^[1-9]\d*/[1-9]\d*$",
        description="Which of several equal shares of the data is this client's, such as 2/4.",
    )
    data_seed: int = Field(0, ge=0, description="Seed of the sharing and of generated problems.")


class ExportDataSettings(DataSettings):
    """Write the samples that a client would use as JSONL, to look at them or to change them."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    output: Path | None = Field(None, description="File to write; none writes to the terminal.")
    split: Literal["train", "test"] = Field("train", description="Which samples.")


class TrainSettings(DataSettings):
    """Fine-tune with others: LESFT's edge client keeps the text and the first decoder layers."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    server: str = Field(description="HOST:PORT of the central server.")
    aggregator: str = Field(description="HOST:PORT of the aggregation server.")
    model: str = Field(
        description="Folder with the tokenizer, with or without weights, or a hub id."
    )
    state: Path = Field(description="Folder for what this client keeps.")
    client_id: str = Field(
        "", description="Name of this client, unique in the run; empty takes the host's name."
    )
    control: str = Field("127.0.0.1:8050", description="HOST:PORT of the local control API.")
    insecure: bool = Field(
        False, description="Allow unencrypted traffic beyond this machine: anyone may read it."
    )
    weights: Literal["auto", "local", "server"] = Field(
        "auto", description="Front weights: from --model where it has any, or from the server."
    )
    cache: Path = Field(
        Path("~/.cache/lesft"), description="Folder for front weights fetched from servers."
    )
    device: str = Field("auto", description="torch device; auto takes CUDA when there is one.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="fp32, or bf16 weights and autocast with adapters in fp32."
    )
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 leaves its default.")
    in_flight: int = Field(
        0,
        ge=0,
        description="Micro-batches sent ahead of their gradients; 0 takes the whole window.",
    )
    max_length: int = Field(
        0, ge=0, description="Skip samples of more tokens; 0 takes the run's own limit."
    )
    patience_seconds: float = Field(
        60, gt=0, description="How long to go on trying a service that does not answer."
    )
    progress: Literal["auto", "bar", "lines"] = Field(
        "auto", description="A progress bar, or a line per round; auto asks the terminal."
    )
    cut_layer: int | None = Field(None, ge=1, description="Insist on this cut layer.")
    lora: LoraSpec | None = Field(None, description="Insist on these adapters.")
    activation_encoding: Encoding | None = Field(None, description="Insist on this encoding.")
    gradient_encoding: Encoding | None = Field(None, description="Insist on this encoding.")
