"""The settings of `lesft-client distill`.

The teacher's key is none of them: settings can be given on a command line, which every user of a
machine can read, and are quoted in messages.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from lesft_client.settings import DataSettings


class DistillSettings(DataSettings):
    """Make a training set of a teacher model's right answers to a data set's questions."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    samples: int = Field(0, ge=0, description="Training questions to ask; 0 asks the whole share.")
    held_out: int = Field(
        0, ge=0, description="Held-out questions to ask with --split test; 0 asks the whole share."
    )
    split: Literal["train", "test"] = Field("train", description="Which questions.")
    teacher: str = Field(
        description="Address of an OpenAI-compatible service, such as http://host:8000/v1."
    )
    teacher_model: str = Field(min_length=1, description="Name of the model that answers there.")
    teacher_key_file: Path | None = Field(
        None,
        description="File that holds the service's key and nothing else; by default the key is "
        "taken from the variable LESFT_CLIENT_TEACHER_KEY.",
    )
    output: Path = Field(description="JSONL file to write, for --data of lesft-client train.")
    licence: str = Field(
        "", description="Licence of what the teacher writes, recorded beside the output."
    )
    tries: int = Field(
        4, ge=1, le=100, description="Answers to ask for until one is right; then it is given up."
    )
    retry_temperature: float = Field(
        0.7, gt=0, le=2, description="Temperature of the second try and later; the first has 0."
    )
    max_tokens: int = Field(
        1024, ge=1, description="Longest answer in tokens; one that is cut off is not kept."
    )
    concurrency: int = Field(8, ge=1, le=1000, description="Questions asked at the same time.")
    requests_per_minute: float = Field(
        0, ge=0, description="Most requests to send in a minute; 0 sets no limit."
    )
    timeout_seconds: float = Field(
        120,
        gt=0,
        description="A request on which nothing arrives for so long is sent again; answers come "
        "whole, so this is also the longest that writing one may take.",
    )
    patience_seconds: float = Field(
        600, gt=0, description="How long to go on trying while every request fails."
    )
    progress: Literal["auto", "bar", "lines"] = Field(
        "auto", description="A progress bar, or a line every ten seconds; auto asks the terminal."
    )

    @field_validator("output")
    @classmethod
    def _is_jsonl(cls, value: Path) -> Path:
        if value.suffix != ".jsonl":
            raise ValueError("must end in .jsonl, as the file is one JSON object a line")
        return value

    @property
    def progress_file(self) -> Path:
        """What is done so far, for going on after an interruption."""
        return self.output.with_suffix(".progress.jsonl")

    @property
    def meta_file(self) -> Path:
        """How the output was made."""
        return self.output.with_suffix(".meta.json")
