"""The testbed's settings, one model per command. The run's own options are the server's."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from lesft.settings import ServiceSettings
from lesft.spec import OptimizerSpec, RunOptions


class CacheSettings(ServiceSettings):
    """Where what is fetched is kept."""

    cache: Path = Field(
        Path("~/.cache/lesft"), description="Folder for the default model and fetched fronts."
    )


class ModelSettings(CacheSettings):
    """Make sure that the small default model is there; the last line is its folder."""

    model_config = SettingsConfigDict(env_prefix="LESFT_TESTBED_")


class RunSettings(CacheSettings, RunOptions):
    """Fine-tune one model with a server, an aggregator and clients, all on this machine."""

    model_config = SettingsConfigDict(env_prefix="LESFT_TESTBED_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    output: Path = Field(
        Path("runs/testbed"), description="Folder for the results; an earlier run's are replaced."
    )
    model: str = Field(
        "", description="Folder in Hugging Face layout or hub id; empty takes SmolLM2-135M."
    )
    data: str = Field(
        "wordproblems",
        description="gsm8k, commonsense_qa, aqua_rat, wordproblems, a JSONL file or a data folder.",
    )
    samples: int = Field(12, ge=1, description="Samples that each client trains on.")
    held_out: int = Field(
        4, ge=0, description="Held-out samples that each client scores before and after."
    )
    questions: int = Field(
        16,
        ge=0,
        description="Test questions to answer before and after, for the accuracy; 0: none.",
    )
    rounds: int = Field(
        0, ge=0, description="Number of rounds, one optimizer step each; 0 derives it from epochs."
    )
    epochs: int = Field(
        3, ge=1, description="Passes over each client's samples, where rounds is 0."
    )
    aggregation_interval: int = Field(
        3, ge=1, description="Rounds between two aggregations; one more ends the run."
    )
    optimizer: OptimizerSpec = OptimizerSpec(learning_rate=5e-4)
    cut_layer: int = Field(
        0, ge=0, description="Decoder layers on the client; 0 takes a quarter of the model."
    )
    weights: Literal["auto", "local", "server"] = Field(
        "server", description="Front weights: handed out by the server, or from the model folder."
    )
    device: str = Field("auto", description="torch device; auto takes CUDA when there is one.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="fp32, or bf16 weights and autocast with adapters in fp32."
    )
    server_threads: int = Field(0, ge=0, description="CPU threads of the server; 0: all cores.")
    client_threads: int = Field(1, ge=0, description="CPU threads of each client; 0: all cores.")
    progress: Literal["auto", "table", "lines"] = Field(
        "auto", description="A live table, or a line per event; auto asks the terminal."
    )

    @model_validator(mode="after")
    def _epochs_make_rounds(self) -> "RunSettings":
        drawn = self.accumulation * self.batch_size
        if self.rounds == 0 and self.samples * self.epochs < drawn:
            raise ValueError(
                f"samples x epochs must be at least accumulation x batch_size ({drawn}) for one "
                f"round, got {self.samples} x {self.epochs}"
            )
        return self

    @property
    def num_rounds(self) -> int:
        """The rounds to train: as asked, or as many as the epochs fill."""
        drawn_per_round = self.accumulation * self.batch_size
        return self.rounds or self.samples * self.epochs // drawn_per_round


class ServeSettings(ServiceSettings):
    """Offer the result of a run as an OpenAI-compatible endpoint, by a server and a client."""

    model_config = SettingsConfigDict(env_prefix="LESFT_TESTBED_")

    output: Path = Field(Path("runs/testbed"), description="Folder of the finished run.")
    listen: str = Field("127.0.0.1:8000", description="HOST:PORT of the endpoint.")


class ChaosSettings(ServiceSettings):
    """Kill services and break links during a run, and compare with the same run undisturbed."""

    model_config = SettingsConfigDict(env_prefix="LESFT_TESTBED_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    output: Path = Field(
        Path("runs/chaos"), description="Folder for the results; an earlier run's are replaced."
    )
    kills: int = Field(20, ge=0, description="Times that a service is killed and started again.")
    cuts: int = Field(20, ge=0, description="Times that a link is cut, delayed or half-opened.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the faults and of the run.")
    rounds: int = Field(
        120,
        ge=6,
        description="Number of rounds; the faults are spread over all but the last tenth.",
    )
    accumulation: int = Field(3, ge=1, description="Micro-batches per round.")
    aggregation_interval: int = Field(3, ge=1, description="Rounds between two aggregations.")
    clients: int = Field(4, ge=1, description="Number of clients that train together.")
    progress: Literal["lines", "none"] = Field(
        "lines", description="A line per fault while it runs, or nothing before the end."
    )
