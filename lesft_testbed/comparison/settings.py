"""The settings of `lesft-testbed compare`. Loads no torch."""

import difflib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lesft.spec import LoraSpec, OptimizerSpec
from lesft_testbed.comparison.presets import SIX_SYSTEMS, SMALL, Preset, Scale, preset_defaults
from lesft_testbed.methods import METHODS
from lesft_testbed.settings import CacheSettings

Measure = Literal["accuracy", "likelihood", "both"]


class _PresetValues(PydanticBaseSettingsSource):
    """The values of the chosen preset: above the defaults, below whatever is given."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """See pydantic-settings."""
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Nothing for a name that is none: validation refuses it."""
        given = self.current_state
        preset, scale = given.get("preset", "none"), given.get("scale", "small")
        return preset_defaults(str(preset), str(scale), given)


class CompareSettings(CacheSettings):
    """Compare methods over models, data, seeds, cuts, samples and clients; each run one command."""

    # Values that go with the scale are in one table, `presets`; the defaults are the small scale's.

    model_config = SettingsConfigDict(env_prefix="LESFT_TESTBED_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    output: Path = Field(
        Path("runs/comparison"),
        description="Folder for the runs and the results; what is finished there is not redone. "
        "With a preset it is runs/PRESET.",
    )
    preset: Preset = Field(
        "none", description="Table or figure of the paper to plan; other options go before it."
    )
    scale: Scale = Field(
        "small", description="small ends on two cores overnight; paper is for a GPU cluster."
    )

    methods: tuple[str, ...] = Field(SIX_SYSTEMS, min_length=1, description="Methods to compare.")
    models: tuple[str, ...] = Field(
        SMALL["models"],
        min_length=1,
        description="Model folders or hub ids; empty takes SmolLM2-135M.",
    )
    data: tuple[str, ...] = Field(
        SMALL["data"], min_length=1, description="Data sets, as --data of run takes them."
    )
    seeds: tuple[int, ...] = Field(
        SMALL["seeds"],
        min_length=1,
        description="Seeds; each draws training data, test questions and the run's randomness.",
    )
    cuts: tuple[str, ...] = Field(
        SMALL["cuts"],
        min_length=1,
        description="Decoder layers on the client: a number, or a part of the model such as 1/4.",
    )
    samples: tuple[int, ...] = Field(
        SMALL["samples"], min_length=1, description="Samples that each client trains on."
    )
    total_samples: int = Field(
        0, ge=0, description="Samples of all clients together, in place of --samples; 0: not used."
    )
    clients: tuple[int, ...] = Field(
        SMALL["clients"], min_length=1, description="Numbers of clients."
    )
    reference: str = Field(
        "",
        description="Method that the others are tested against; empty: lesft, or else the first.",
    )

    epochs: int = Field(SMALL["epochs"], ge=1, description="Passes over each client's samples.")
    accumulation: int = Field(SMALL["accumulation"], ge=1, description="Micro-batches per round.")
    batch_size: int = Field(
        SMALL["batch_size"], ge=1, description="Samples per micro-batch and client."
    )
    aggregation_interval: int = Field(
        SMALL["aggregation_interval"], ge=1, description="Rounds between two aggregations."
    )
    max_length: int = Field(
        SMALL["max_length"], ge=2, description="Most tokens of one training sequence."
    )
    lora: LoraSpec = LoraSpec(**SMALL["lora"])
    optimizer: OptimizerSpec = OptimizerSpec(**SMALL["optimizer"])
    skew: Literal["none", "label", "answer", "steps", "size"] = Field(
        "none", description="What the clients' shares differ in: the label, answer, steps, size."
    )
    skew_alpha: float = Field(
        0.5, gt=0, description="Dirichlet concentration of the skew; smaller is more uneven."
    )

    questions: int = Field(
        SMALL["questions"],
        ge=0,
        description="Test questions for each run; 0: none, for cost alone.",
    )
    measure: Measure = Field(
        "both", description="What is measured on them: right answers, -log P of the solutions."
    )
    max_tokens: int = Field(SMALL["max_tokens"], ge=1, description="Most tokens of an answer.")
    shots: int = Field(
        SMALL["shots"], ge=1, description="Solved examples of the untuned model's few-shot row."
    )
    device: str = Field("auto", description="torch device; auto takes CUDA when there is one.")
    precision: Literal["fp32", "bf16"] = Field(
        SMALL["precision"], description="fp32, or bf16 weights and autocast with adapters in fp32."
    )
    server_threads: int = Field(
        SMALL["server_threads"], ge=0, description="CPU threads of a server; 0: all cores."
    )
    client_threads: int = Field(
        SMALL["client_threads"], ge=0, description="CPU threads of a client; 0: all cores."
    )

    jobs: int = Field(
        0, ge=0, description="Runs at once; 0 chooses by cores and memory, one on a GPU."
    )
    replace: bool = Field(
        False,
        description="Run again what is finished under other settings or on other data; else that "
        "is refused.",
    )
    manifest_only: bool = Field(
        False, description="Only write the list of commands, for a queue; start nothing."
    )
    collect: bool = Field(
        False, description="Only make the results of what is there; start nothing."
    )

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: Any, **named_sources: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The preset comes after all that its user gave."""
        given = super().settings_customise_sources(settings_cls, *sources, **named_sources)
        return (*given, _PresetValues(settings_cls))

    @field_validator("methods", "models", "data", "seeds", "cuts", "samples", "clients")
    @classmethod
    def _is_a_list_of_different_values(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = [str(value) for value in dict.fromkeys(values) if values.count(value) > 1]
        if twice:
            raise ValueError(f"must name each value once, {', '.join(twice)} comes twice")
        return values

    @field_validator("methods")
    @classmethod
    def _are_methods(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if value not in METHODS:
                close = difflib.get_close_matches(value, METHODS, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise ValueError(f"must be of {', '.join(METHODS)}; {value} is none{hint}")
        return values

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not all(0 <= value < 2**63 for value in values):
            raise ValueError("must be numbers from 0 to 2^63 - 1")
        return values

    @field_validator("samples", "clients")
    @classmethod
    def _are_counts(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if min(values) < 1:
            raise ValueError("must be numbers from 1")
        return values

    @field_validator("cuts")
    @classmethod
    def _are_cuts(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(r"(1/)?[1-9][0-9]{0,3}", value) for value in values):
            raise ValueError("must be numbers of layers from 1, or parts of the model such as 1/4")
        return values

    @model_validator(mode="after")
    def _makes_sense(self) -> "CompareSettings":
        if self.reference and self.reference not in self.methods:
            raise ValueError(
                f"--reference must be one of --methods ({', '.join(self.methods)}), got "
                f"{self.reference}"
            )
        if self.manifest_only and self.collect:
            raise ValueError("--manifest-only and --collect are two commands: give one of them")
        if self.total_samples and "samples" in self.model_fields_set:
            raise ValueError(
                f"--total-samples ({self.total_samples}) is in place of --samples "
                f"({', '.join(map(str, self.samples))}): give one of them"
            )
        if self.total_samples and self.total_samples < max(self.clients):
            raise ValueError(
                f"--total-samples must give each of {max(self.clients)} clients one at least, got "
                f"{self.total_samples}"
            )
        drawn = self.accumulation * self.batch_size
        fewest = min(self.samples_of(clients)[0] for clients in self.clients)
        if fewest * self.epochs < drawn:
            raise ValueError(
                f"samples of a client x --epochs must be at least --accumulation x --batch-size "
                f"({drawn}) for one round, got {fewest} x {self.epochs}"
            )
        return self

    @property
    def reference_method(self) -> str:
        """The method that all others are tested against."""
        return self.reference or ("lesft" if "lesft" in self.methods else self.methods[0])

    def samples_of(self, clients: int) -> tuple[int, ...]:
        """The samples per client to run with so many clients, ascending."""
        if self.total_samples:
            return (self.total_samples // clients,)
        return tuple(sorted(self.samples))
