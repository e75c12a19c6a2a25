"""The settings of `lesft-testbed bench`. Loads no torch."""

import difflib
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_settings import SettingsConfigDict

from lesft_testbed.bench.parts import PARTS
from lesft_testbed.settings import CacheSettings


class _PartSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OverheadSettings(_PartSettings):
    """The part `overhead`."""

    rounds: int = Field(6, ge=1, description="Rounds that are measured, one optimizer step each.")
    skipped_rounds: int = Field(
        2, ge=1, description="Rounds before these that are not: memory and caches settle in them."
    )
    cached_epochs: int = Field(
        5, ge=2, description="Epochs of the run whose reference path is taken in the first only."
    )


class WireSettings(_PartSettings):
    """The part `wire`."""

    clients: int = Field(4, ge=1, description="Clients that train together.")
    epochs: int = Field(
        10, ge=1, description="Passes over each client's samples; the paper makes ten."
    )


class AggregateSettings(_PartSettings):
    """The part `aggregate`."""

    submissions: int = Field(200, ge=1, description="Adapters that are averaged.")
    layers: int = Field(
        9,
        ge=1,
        description="Layers of each adapter, of Qwen2.5-3B's shape with rank 8: 1.25 MB a layer.",
    )
    flower_python: str = Field(
        "",
        description="Python that has Flower, whose requirements are not ours; empty: this one.",
        exclude=True,  # where it lies makes no other measurement
    )


class WanSettings(_PartSettings):
    """The part `wan`."""

    round_trip_ms: float = Field(50, ge=0, description="Round trip of the link in ms.")
    up_mbit: float = Field(20, gt=0, description="Its bandwidth to the server in Mbit/s.")
    down_mbit: float = Field(50, gt=0, description="Its bandwidth to the client in Mbit/s.")
    jitter_ms: float = Field(0, ge=0, description="Most that bytes are late beside that, in ms.")
    accumulation: int = Field(4, ge=1, description="Micro-batches per round.")
    rounds: int = Field(5, ge=1, description="Rounds that are measured, one optimizer step each.")
    skipped_rounds: int = Field(1, ge=1, description="Rounds before these that are not.")
    calibration_seconds: float = Field(
        2.0, gt=0, description="Seconds of each bulk transfer that measures the link."
    )


class BatchingSettings(_PartSettings):
    """The part `batching`."""

    clients: int = Field(4, ge=2, description="Clients of the cohort, one sample each in a step.")
    steps: int = Field(4, ge=1, description="Steps that are measured, on other samples each.")
    skipped_steps: int = Field(1, ge=0, description="Steps before these that are not.")


class ScaleSettings(_PartSettings):
    """The part `scale`."""

    clients: tuple[int, ...] = Field(
        (1, 4, 16, 64), min_length=2, description="Numbers of clients that are compared."
    )
    tokens: int = Field(
        160,
        ge=4,
        le=1024,
        description="Tokens of each path of each client's micro-batch; word problems have so many.",
    )
    hidden_size: int = Field(
        512, ge=64, multiple_of=64, description="Width of the random five-layer model."
    )
    steps: int = Field(3, ge=1, description="Steps that are measured at least.")
    seconds: float = Field(10, ge=0, description="And so many seconds at least.")
    skipped_steps: int = Field(2, ge=1, description="Steps before these that are not.")


class DecodeSettings(_PartSettings):
    """The part `decode`."""

    texts: int = Field(8, ge=1, le=8, description="Texts that are written.")
    tokens: int = Field(60, ge=2, description="Tokens of each.")


class MemorySettings(_PartSettings):
    """The part `memory`."""

    cut_layer: int = Field(9, ge=1, description="Layers on the client, of Qwen2.5-3B's shape.")
    tokens: int = Field(512, ge=8, description="Tokens of each path of the one sample.")


class BenchSettings(CacheSettings):
    """Measure what training costs, against alternatives in the same run and against targets."""

    model_config = SettingsConfigDict(env_prefix="LESFT_TESTBED_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    output: Path = Field(
        Path("runs/bench"),
        description="Folder for the results; parts that are finished there are not measured again.",
    )
    parts: tuple[str, ...] = Field(
        tuple(PARTS), min_length=1, description="Parts to measure, in this order."
    )
    repeats: int = Field(
        3,
        ge=1,
        description="Times that each alternative is measured, by turns with the others; what "
        "cannot differ from one time to the next is measured once.",
    )
    replace: bool = Field(False, description="Measure again what is finished.")
    model: str = Field(
        "", description="Folder in Hugging Face layout or hub id; empty takes SmolLM2-135M."
    )
    data: str = Field(
        "wordproblems",
        description="gsm8k, commonsense_qa, aqua_rat, wordproblems, a JSONL file or a data folder.",
    )
    samples: int = Field(12, ge=1, description="Samples that each client trains on.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of data and runs.")
    threads: int = Field(0, ge=0, description="CPU threads of each process; 0: all cores.")
    overhead: OverheadSettings = OverheadSettings()
    wire: WireSettings = WireSettings()
    aggregate: AggregateSettings = AggregateSettings()
    wan: WanSettings = WanSettings()
    batching: BatchingSettings = BatchingSettings()
    scale: ScaleSettings = ScaleSettings()
    decode: DecodeSettings = DecodeSettings()
    memory: MemorySettings = MemorySettings()

    @field_validator("parts")
    @classmethod
    def _are_parts(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if value not in PARTS:
                close = difflib.get_close_matches(value, PARTS, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise ValueError(f"must be of {', '.join(PARTS)}; {value} is none{hint}")
        if len(set(values)) < len(values):
            raise ValueError(f"must name each part once, got {', '.join(values)}")
        return values

    @property
    def num_threads(self) -> int:
        """Threads of each process, as a number."""
        return self.threads or os.cpu_count() or 1
