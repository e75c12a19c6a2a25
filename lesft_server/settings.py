"""The server's settings; the run's own part of them becomes the run spec."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from lesft.identity.settings import SecuritySettings
from lesft.limit_settings import CallLimits
from lesft.logs import LogSettings
from lesft.spec import RunOptions, RunSpec


class ServerSettings(SecuritySettings, CallLimits, RunOptions, LogSettings):
    """LESFT's central server: the back of the model for a cohort of edge clients."""

    model_config = SettingsConfigDict(env_prefix="LESFT_SERVER_")

    config: Path | None = Field(None, description="TOML file with any of these settings.")
    model: str = Field(description="Base model: a hub id or a folder in Hugging Face layout.")
    state: Path = Field(description="Folder for what the server keeps.")
    listen: str = Field("127.0.0.1:50051", description="HOST:PORT of the gRPC service.")
    control: str = Field("127.0.0.1:8051", description="HOST:PORT of the control API.")
    device: str = Field("auto", description="torch device; auto takes CUDA when there is one.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="fp32, or bf16 weights and autocast with adapters in fp32."
    )
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 leaves its default.")
    gradient_checkpointing: bool = Field(
        False,
        description="Compute each layer's inside again in the backward pass instead of keeping "
        "it: less memory, more time, the same result.",
    )
    logits_slice: int = Field(
        1024, ge=1, description="Target tokens per slice of the LM head; bounds its memory."
    )
    batch_tokens: int = Field(
        0,
        ge=0,
        description="Most tokens, with padding, of one batch of the model; bounds its memory, as a "
        "larger step of the cohort is taken in several. 0: 512 on a CPU, 16384 on a GPU.",
    )
    cut_layer: int = Field(
        0, ge=0, description="Decoder layers on the client; 0 takes a quarter of the model."
    )
    fresh: bool = Field(
        False, description="Drop what an earlier run left in --state and start anew."
    )
    share_adapter: bool = Field(
        False,
        description="Hand the server's half of the adapter out to clients that export.",
    )
    accept_plans: bool = Field(
        False,
        description="Before any client has joined, lesft-client plan --apply may choose another "
        "cut layer and other encodings.",
    )
    cache_mib: int = Field(
        2048, ge=1, description="Memory for keys and values of all texts being written, in MiB."
    )
    max_sequences: int = Field(64, ge=1, description="Texts that may be written at once.")
    max_context: int = Field(
        0, ge=0, description="Most tokens of one text with its prompt; 0 takes the model's own."
    )
    idle_seconds: float = Field(
        120, gt=0, description="A text that nothing comes for in so long gives its memory back."
    )
    kept_activations_mib: int = Field(
        8192,
        ge=0,
        description="Disk for activations of clients that do not train, in MiB; what has no room "
        "is sent again.",
    )
    remembered_mib: int = Field(
        256,
        ge=0,
        description="Memory for labels and reference probabilities that clients need not send "
        "again (loss.reference_refresh), in MiB; what has no room is sent again.",
    )
    max_receiving_mib: int = Field(
        2048,
        ge=1,
        description="Room for all bundles that are being received at once, in MiB; the rest wait.",
    )
    max_activation_norm: float = Field(
        0, ge=0, description="Largest L2 norm of one token's hidden state; 0: no limit."
    )
    norm_policy: Literal["refuse", "clip"] = Field(
        "refuse",
        description="Hidden states above that norm end their client's call, or are cut down to it.",
    )
    heartbeat_seconds: float = Field(
        5, gt=0, description="How often the server and its clients say that they are there."
    )
    stall_seconds: float = Field(
        60, gt=0, description="A client that nothing is heard of for so long counts as away."
    )

    @model_validator(mode="after")
    def _heartbeats_come_in_time(self) -> "ServerSettings":
        if self.stall_seconds < 2 * self.heartbeat_seconds:
            raise ValueError(
                f"--stall-seconds must be at least twice --heartbeat-seconds "
                f"({self.heartbeat_seconds:g}), got {self.stall_seconds:g}"
            )
        return self

    @model_validator(mode="after")
    def _quorum_has_a_deadline(self) -> "ServerSettings":
        if self.quorum and self.mode == "lockstep":
            raise ValueError(
                f"--quorum {self.quorum} only counts after a deadline: set --mode deadline"
            )
        return self

    def run_spec(self, model_name: str, cut_layer: int, front_fingerprint: str) -> RunSpec:
        """The run spec of these settings for the model that was loaded."""
        options = self.model_dump(include=set(RunOptions.model_fields))
        return RunSpec(
            **options,
            model_name=model_name,
            cut_layer=cut_layer,
            front_fingerprint=front_fingerprint,
        )
