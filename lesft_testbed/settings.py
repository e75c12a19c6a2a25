"""The testbed's settings, one model per command. The run's own options are the server's."""

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lesft.settings import ServiceSettings
from lesft.spec import AdapterEncoding, Encoding, LossSpec, OptimizerSpec, RunOptions
from lesft_testbed.methods import DEFAULT_METHOD, METHODS


class CacheSettings(ServiceSettings):
    """Where what is fetched is kept."""

    cache: Path = Field(
        Path("~/.cache/lesft"), description="Folder for the default model and fetched fronts."
    )


class ModelSettings(CacheSettings):
    """Make sure that the small default model is there; the last line is its folder."""

    model_config = SettingsConfigDict(env_prefix="LESFT_TESTBED_")


_PER_CLIENT = ("samples", "held_out", "batch_size")


class _Preset(PydanticBaseSettingsSource):
    """The values of the chosen method: above the defaults, below whatever is given."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """See pydantic-settings."""
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Nothing for a name that is none: validation refuses it."""
        method = METHODS.get(self.current_state.get("method", DEFAULT_METHOD))
        return method.settings() if method else {}


class RunSettings(CacheSettings, RunOptions):
    """Fine-tune one model with all the services of a method, each a process on this machine."""

    model_config = SettingsConfigDict(env_prefix="LESFT_TESTBED_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    output: Path = Field(
        Path("runs/testbed"), description="Folder for the results; an earlier run's are replaced."
    )
    method: str = Field(
        DEFAULT_METHOD,
        description=f"What is run: {', '.join(METHODS)}. It sets split, pooled, train_front, "
        "aggregate and the loss; whatever of these is given, too, goes before it.",
    )
    split: bool = Field(
        True,
        description="A server runs all but the first layers; if not, each client holds the whole "
        "model, and there is no server.",
    )
    pooled: bool = Field(
        False, description="One client trains on all clients' samples, as many in each round."
    )
    model: str = Field(
        "", description="Folder in Hugging Face layout or hub id; empty takes SmolLM2-135M."
    )
    data: str = Field(
        "wordproblems",
        description="gsm8k, commonsense_qa, aqua_rat, wordproblems, a JSONL file or a data folder.",
    )
    tls: bool = Field(
        False,
        description="Encrypt all connections, as between machines: clients enrol, and certificates "
        "say who they are.",
    )
    samples: int = Field(12, ge=1, description="Samples that each client trains on.")
    skew: Literal["none", "label", "answer", "steps", "size"] = Field(
        "none",
        description="What the clients' shares differ in: kind of problem, answer, steps of the "
        "solution, or size; samples is then the mean.",
    )
    skew_alpha: float = Field(
        0.5, gt=0, description="Dirichlet parameter of skew: the smaller, the more they differ."
    )
    held_out: int = Field(
        4, ge=0, description="Held-out samples that each client scores before and after."
    )
    questions: int = Field(
        16,
        ge=0,
        description="Test questions to put to the model as it was and as it is then; 0: none.",
    )
    measure: Literal["accuracy", "likelihood", "both"] = Field(
        "accuracy",
        description="What of the test questions: right answers, -log P of their own solutions.",
    )
    measure_before: bool = Field(
        True, description="Put the test questions to the untuned model, too."
    )
    max_tokens: int = Field(160, ge=1, description="Most tokens of an answer to a test question.")
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
    server_threads: int = Field(
        0,
        ge=0,
        description="CPU threads of the server, of the one node that has all data, and of the "
        "answers; 0: all cores.",
    )
    client_threads: int = Field(1, ge=0, description="CPU threads of each client; 0: all cores.")
    progress: Literal["auto", "table", "lines"] = Field(
        "auto", description="A live table, or a line per event; auto asks the terminal."
    )

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: Any, **named_sources: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The method's preset comes after all that its user gave."""
        given = super().settings_customise_sources(settings_cls, *sources, **named_sources)
        return (*given, _Preset(settings_cls))

    @field_validator("method")
    @classmethod
    def _is_a_method(cls, value: str) -> str:
        if value not in METHODS:
            close = difflib.get_close_matches(value, METHODS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"must be one of {', '.join(METHODS)}{hint}")
        return value

    @model_validator(mode="after")
    def _somebody_trains(self) -> "RunSettings":
        if not self.split and not self.train_front:
            raise ValueError(
                "--no-train-front leaves the training to the server, and with --no-split there is "
                "none: leave out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _personal_layers_are_of_something_shared(self) -> "RunSettings":
        if self.personal_layers and not (self.aggregate and self.train_front and not self.pooled):
            layers = ",".join(map(str, self.personal_layers))
            raise ValueError(
                f"--personal-layers {layers} says what stays out of the average, but nothing is "
                "averaged with --no-aggregate, --no-train-front or --pooled, as --method "
                f"{self.method} may set them: leave it out"
            )
        return self

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

    @property
    def needs_aggregator(self) -> bool:
        """Whether anything is averaged. A client with a server asks even when it is alone."""
        averages = self.aggregate and self.train_front
        return averages and (self.split or self.as_trained().clients > 1)

    @property
    def trains_nothing(self) -> bool:
        """Whether the loss is zero, as with weight 0 for every token and nothing beside it."""
        loss = self.loss
        is_zero = loss.token_weights == "uniform" and loss.uniform_weight == 0
        return is_zero and loss.base_nll_weight == 0 and loss.reference_nll_weight == 0

    @property
    def one_adapter(self) -> bool:
        """Whether all clients end with the same adapter."""
        alone = self.as_trained().clients == 1
        shared = self.aggregate or not self.train_front
        return alone or (shared and not self.personal_layers)

    def as_trained(self) -> "RunSettings":
        """As those who train see them: where the data is pooled, one client with all of it.

        It draws in each micro-batch what all clients would, so that steps and samples are as many.
        """
        if not self.pooled:
            return self
        whole = {name: self.clients * getattr(self, name) for name in _PER_CLIENT}
        alone = {"clients": 1, "quorum": min(self.quorum, 1), "pooled": False, "skew": "none"}
        threads = self.client_threads if self.split else self.server_threads
        return self.model_copy(update={**whole, **alone, "client_threads": threads})


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
    activation_encoding: Encoding = Field("raw", description="How activations travel.")
    gradient_encoding: Encoding = Field("raw", description="How gradients travel.")
    adapter_encoding: AdapterEncoding = Field("raw", description="How adapters travel.")
    loss: LossSpec = LossSpec()
    progress: Literal["lines", "none"] = Field(
        "lines", description="A line per fault while it runs, or nothing before the end."
    )
