"""The client's settings, one model per command."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
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
        description="Which of several equal shares of the data is this client's, such as 2/4.",
    )
    data_seed: int = Field(0, ge=0, description="Seed of the sharing and of generated problems.")

    @field_validator("share")
    @classmethod
    def _is_one_of_the_shares(cls, value: str) -> str:
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value, re.ASCII)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError("must be I/N with I from 1 to N, such as 2/4 for the second of four")
        return value

    @property
    def share_parts(self) -> tuple[int, int]:
        """Which share it is, counted from 1, and of how many."""
        number, of = self.share.split("/")
        return int(number), int(of)


class ExportDataSettings(DataSettings):
    """Write the samples that a client would use as JSONL, to look at them or to change them."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    output: Path | None = Field(None, description="File to write; none writes to the terminal.")
    split: Literal["train", "test"] = Field("train", description="Which samples.")


class RequiredLora(LoraSpec):
    """Refuse a run with other adapters; what is not given here is the server's."""


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
        "",
        pattern=r"^[A-Za-z0-9._-]{0,64}$",
        description="Name of this client, unique in the run; empty takes the host's name.",
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
        None, ge=1, description="Refuse a run with another cut layer; by default any will do."
    )
    activation_encoding: Encoding | None = Field(
        None, description="Refuse a run with another encoding of activations."
    )
    gradient_encoding: Encoding | None = Field(
        None, description="Refuse a run with another encoding of gradients."
    )
    lora: RequiredLora | None = None
