"""The client's settings, one model per command; those of `train` are in `train_settings`."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from lesft.sampling import Sampling
from lesft.settings import ServiceSettings
from lesft_client.connection_settings import ConnectionSettings, ListenerSettings
from lesft_client.log_settings import ClientLogSettings

Precision = Literal["fp32", "bf16", "int8", "int4"]
"""As `lesft.device` has it, which loads torch."""


def _checked_share(value: str) -> str:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError("must be I/N with I from 1 to N, such as 2/4 for the second of four")
    return value


def _share_parts(share: str) -> tuple[int, int]:
    number, of = share.split("/")
    return int(number), int(of)


class DataSettings(ServiceSettings):
    """Which samples the client uses."""

    data: str = Field(
        description="gsm8k, commonsense_qa, aqua_rat, wordproblems, a JSONL file or a data folder."
    )
    samples: int = Field(
        0,
        ge=0,
        description="Samples to train on, on average where shares differ in size; 0 takes the "
        "whole share.",
    )
    held_out: int = Field(
        0, ge=0, description="Held-out samples to score before and after training; 0 scores none."
    )
    share: str = Field(
        "1/1",
        description="Which of several shares of the data is this client's, such as 2/4.",
    )
    skew: Literal["none", "label", "answer", "steps", "size"] = Field(
        "none",
        description="In what the shares for training differ: the data's own labels, the final "
        "answer's letter, the number of steps, or only in size.",
    )
    skew_alpha: float = Field(
        0.5,
        gt=0,
        allow_inf_nan=False,
        description="How little they differ: the parameter of a Dirichlet distribution; 0.1 is "
        "far apart, 100 nearly equal.",
    )
    data_seed: int = Field(0, ge=0, description="Seed of the sharing and of generated problems.")

    @field_validator("share")
    @classmethod
    def _is_one_of_the_shares(cls, value: str) -> str:
        return _checked_share(value)

    @property
    def share_parts(self) -> tuple[int, int]:
        """Which share it is, counted from 1, and of how many."""
        return _share_parts(self.share)


class ExportDataSettings(DataSettings):
    """Write the samples that a client would use as JSONL, to look at them or to change them."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    output: Path | None = Field(None, description="File to write; none writes to the terminal.")
    split: Literal["train", "test"] = Field("train", description="Which samples.")


class LanguageModelSettings(ConnectionSettings, ClientLogSettings):
    """Which model answers, and where it runs."""

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    server: str = Field("", description="HOST:PORT of the central server; not used with --local.")
    model: str = Field(
        description="Folder with the tokenizer, with or without weights, or a hub id."
    )
    state: Path | None = Field(
        None, description="The --state of lesft-client train, for its adapter."
    )
    untuned: bool = Field(False, description="The model as it was before the fine-tuning.")
    local: bool = Field(
        False, description="Run the whole model here, with weights and --adapter; needs no server."
    )
    adapter: Path | None = Field(
        None, description="local: folder of a PEFT adapter of the whole model."
    )
    weights: Literal["auto", "local", "server"] = Field(
        "auto", description="Front weights: from --model where it has any, or from the server."
    )
    cache: Path = Field(
        Path("~/.cache/lesft"), description="Folder for front weights fetched from servers."
    )
    device: str = Field("auto", description="torch device; auto takes CUDA when there is one.")
    precision: Precision = Field(
        "fp32", description="fp32, or bf16, int8 or int4 weights; the last two with a server only."
    )
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 leaves its default.")
    speculate: int | None = Field(
        None,
        ge=0,
        le=32,
        description="Tokens to guess from the text so far per round trip, for the same output in "
        "fewer of them; by default 8, and 0 with a temperature.",
    )
    patience_seconds: float = Field(
        60, gt=0, description="How long to go on trying a server that is away or has no room."
    )
    stall_seconds: float = Field(
        60,
        gt=0,
        description="A connection that falls silent for so long is given up for a new one.",
    )


class WriteSettings(LanguageModelSettings, Sampling):
    """Which model writes, and how it chooses its words."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    max_tokens: int = Field(256, ge=1, description="Most tokens of an answer.")
    stop: tuple[str, ...] = Field(
        (), description="Strings that end an answer and are not part of it; may be given often."
    )
    system: str = Field("", description="What the model is told before all else.")

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})

    @field_validator("stop")
    @classmethod
    def _holds_no_empty_string(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("a stop string must not be empty")
        return value


class GenerateSettings(WriteSettings):
    """Write one text after a prompt."""

    prompt: str = Field(
        "-", description="What is asked; - reads it from standard input, as a pipe may bring it."
    )
    raw: bool = Field(
        False, description="Go on with the prompt as it is, without the model's chat template."
    )
    stats: bool = Field(False, description="Say on standard error how many tokens, and how fast.")


class ChatSettings(WriteSettings):
    """Talk with the model on the terminal."""


class ServeSettings(LanguageModelSettings, ListenerSettings):
    """Serve the model with OpenAI's HTTP API to any program that speaks it."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    listen: str = Field("127.0.0.1:8000", description="HOST:PORT; port 0 takes a free one.")
    api_key_file: Path | None = Field(
        None,
        description="File with the key that requests must bring; the variable "
        "LESFT_CLIENT_API_KEY does it, too. By default no key is asked for.",
    )
    temperature: float = Field(
        1.0, ge=0, le=100, description="For requests that name none, as with OpenAI; 0 is greedy."
    )
    max_tokens: int = Field(
        1024,
        ge=0,
        description="Most tokens of an answer whose request names no limit; 0: what fits.",
    )


class ExportSettings(ConnectionSettings):
    """Join the client's half of a finished run's adapter and the server's into one for peft."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    state: Path = Field(description="The --state of lesft-client train, with the client's half.")
    server: str = Field(
        "", description="HOST:PORT of the central server, for its half; needs its --share-adapter."
    )
    back: Path | None = Field(
        None, description="In place of --server: its adapter.safetensors, or its --state folder."
    )
    output: Path = Field(description="Folder to write: a new one, or an earlier adapter's.")
    model: str = Field(
        "", description="Base model, a folder or hub id, as the adapter is to name it."
    )
    merged: bool = Field(
        False, description="Write whole weights, the adapter merged into those of --model."
    )
    patience_seconds: float = Field(
        60, gt=0, description="How long to go on trying a server that does not answer."
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> "ExportSettings":
        if bool(self.server) == (self.back is not None):
            raise ValueError(
                "the server's half of the adapter comes from --server or from --back: give one of "
                "the two"
            )
        return self

    @model_validator(mode="after")
    def _merges_into_something(self) -> "ExportSettings":
        if self.merged and not self.model:
            raise ValueError("--merged needs --model: a folder or hub id with the base's weights")
        return self


class EvaluateSettings(LanguageModelSettings):
    """Ask the model the questions of a benchmark: right answers, and how likely the solutions."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    benchmark: str = Field(
        description="gsm8k, commonsense_qa, aqua_rat, wordproblems, a folder with one of them, or "
        "a JSONL file as --data of train takes it, of whose lines the held-out tenth is asked."
    )
    data: str = Field(
        "", description="Folder with the benchmark's rows; by default they come from the hub."
    )
    output: Path = Field(
        description="Folder for predictions and report; an evaluation that was stopped goes on "
        "from what is there."
    )
    fresh: bool = Field(
        False, description="Drop the predictions that an earlier run left in --output."
    )
    questions: int = Field(
        100, ge=0, description="Questions to ask at most, drawn with --data-seed; 0 asks all."
    )
    share: str = Field(
        "1/1", description="Which of several equal shares of these questions to ask, such as 2/4."
    )
    shots: int = Field(
        0, ge=0, description="Solved examples of the train split to show before each question."
    )
    data_seed: int = Field(
        0, ge=0, description="Seed of which questions and examples; for a file, that of train."
    )
    measure: Literal["accuracy", "likelihood", "both"] = Field(
        "accuracy",
        description="Have answers written and count the right ones; or take how likely the data's "
        "own solutions are, which writes nothing and tells more with few questions; or both.",
    )
    prompt: Literal["chat", "harness"] = Field(
        "chat",
        description="The wording of the training in the model's chat template, or the plain text "
        "of lm-evaluation-harness.",
    )
    answer: Literal["auto", "lenient", "strict", "flexible", "boxed", "letter", "likelihood"] = (
        Field(
            "auto",
            description="Where the answer is read: on the #### line (strict), in \\boxed{}, as the "
            "last number (flexible), or in the first of these that has one (lenient); of choices, "
            "the letter that is written, or the likeliest one. auto: lenient; letter with the chat "
            "prompt, likelihood with the harness's.",
        )
    )
    max_tokens: int = Field(256, ge=1, description="Most tokens of an answer.")
    sampling: Sampling = Sampling()
    batch: int = Field(8, ge=1, le=1024, description="Questions to ask at once.")
    progress: Literal["auto", "bar", "lines"] = Field(
        "auto", description="A progress bar, or a line every ten seconds; auto asks the terminal."
    )

    @field_validator("benchmark")
    @classmethod
    def _is_a_benchmark(cls, value: str) -> str:
        names = ("gsm8k", "commonsense_qa", "aqua_rat", "wordproblems")
        if value not in names and not value.endswith(".jsonl") and not Path(value).is_dir():
            raise ValueError(f"must be one of {', '.join(names)}, a folder, or end in .jsonl")
        return value

    @field_validator("share")
    @classmethod
    def _is_one_of_the_shares(cls, value: str) -> str:
        return _checked_share(value)

    @property
    def share_parts(self) -> tuple[int, int]:
        """Which share it is, counted from 1, and of how many."""
        return _share_parts(self.share)

    @model_validator(mode="after")
    def _has_one_source(self) -> "EvaluateSettings":
        if self.data and self.benchmark not in ("gsm8k", "commonsense_qa", "aqua_rat"):
            raise ValueError(f"--benchmark {self.benchmark} brings its own rows: leave out --data")
        return self
