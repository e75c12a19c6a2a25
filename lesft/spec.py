"""What all parties of a run must agree on: the run spec and its parts. Loads no torch.

Every field's sentence is also the help of the server's option of that name: the server holds the
spec, hands it to each client, and nobody changes it in mid-run.
"""

import hashlib
import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Encoding = Literal["raw", "bf16", "int8", "int4"]
"""How activations or gradients travel: as they are computed, or in fewer bits a value."""

AdapterEncoding = Literal["raw", "int8", "int4"]
"""How adapters travel: as they are, or as their change since the last average; `adapter_codec`."""

PROTOCOL_VERSION = 6

CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What a client's name may be."""

REFRESH_WORDS = {"every_step": 1, "every_epoch": 1, "once": 0}
"""Of `reference_refresh`. A sample is drawn once an epoch, so the first two are the same."""

MAX_NUM_SAMPLES = 1 << 40
"""More samples than any data set has: a client that claimed more would have all the weight, and
sums of more would not stay exact in 64 bits."""


class _Spec(BaseModel):
    # A number that is not finite passes no JSON, and NaN passes many a bound.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraSpec(_Spec):
    """The low-rank adapters on both sides (METHOD section 1)."""

    rank: int = Field(8, ge=1, le=4096, description="LoRA rank r.")
    alpha: float = Field(16, gt=0, description="LoRA alpha; updates are scaled by alpha / rank.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout on the adapters' input.")
    target_modules: tuple[str, ...] = Field(
        ("gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Names of the linear layers that get an adapter.",
    )


class LossSpec(_Spec):
    """The dual-path token-weighted loss (METHOD section 4)."""

    token_weights: Literal["adaptive", "uniform", "probability"] = Field(
        "adaptive",
        description="Weight of each target token: from its probability on the reference path, one "
        "number for all, or the token's own probability (DFT).",
    )
    uniform_weight: float = Field(
        1.0, ge=0, description="The weight of every token when token_weights is uniform."
    )
    salient_threshold: float = Field(
        0.95, gt=0, lt=1, description="Reference probability above which a token is salient."
    )
    gamma_salient: float = Field(5.0, gt=0, description="Exponent of salient tokens' weight.")
    gamma_sub_salient: float = Field(
        0.3, gt=0, description="Exponent of sub-salient tokens' weight."
    )
    gamma_irrelevant: float = Field(0.6, gt=0, description="Exponent of irrelevant tokens' weight.")
    clustering: Literal["global", "contiguous"] = Field(
        "global", description="Sub-salient: near any salient token, or grown from one outwards."
    )
    cluster_similarity: float = Field(
        0.6, ge=-1, le=1, description="Cosine similarity from which a token counts as near."
    )
    base_nll_weight: float = Field(
        0.0, ge=0, description="Weight of a plain -log P beside the weighted one, base path."
    )
    reference_nll_weight: float = Field(
        0.0, ge=0, description="Weight of a plain -log P on the reference path."
    )
    reference_refresh: int = Field(
        1,
        ge=0,
        description="Epochs for which a sample's reference probabilities hold, remembered by the "
        "server: 1 (every_step) takes them anew whenever it is drawn, 0 (once) never again.",
    )

    @field_validator("reference_refresh", mode="before")
    @classmethod
    def _words_stand_for_epochs(cls, value: Any) -> Any:
        return REFRESH_WORDS.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _can_remember(self) -> "LossSpec":
        if self.remembers_reference and self.trains_reference:
            raise ValueError(
                "reference_nll_weight trains the reference path, whose gradient needs its "
                "activations each time: leave reference_refresh at every_step, got "
                f"{self.reference_refresh}"
            )
        return self

    @property
    def remembers_reference(self) -> bool:
        """Whether reference probabilities are used again after the step that they were made in."""
        return self.needs_reference and self.reference_refresh != 1

    def forgets_before(self, epoch: int) -> bool:
        """Whether remembered reference probabilities hold no longer when an epoch begins."""
        anew = self.reference_refresh > 0 and epoch % self.reference_refresh == 0
        return self.remembers_reference and anew

    @property
    def needs_reference(self) -> bool:
        """Whether the clients compute and send the reference path at all."""
        return self.token_weights == "adaptive" or self.reference_nll_weight > 0

    @property
    def trains_reference(self) -> bool:
        """Whether the reference path gets a gradient."""
        return self.reference_nll_weight > 0


class OptimizerSpec(_Spec):
    """AdamW and its schedule, the same on both sides."""

    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after the warm-up."
    )
    warmup_rounds: int = Field(0, ge=0, description="Rounds of linear warm-up from zero.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Each side clips its gradient to this norm; 0 turns it off."
    )


class RunOptions(_Spec):
    """The run's settings that an operator chooses freely."""

    run_id: str = Field("lesft", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name of the run.")
    clients: int = Field(4, ge=1, description="Number of clients that train together.")
    rounds: int = Field(ge=1, description="Number of rounds; each ends in one optimizer step.")
    accumulation: int = Field(4, ge=1, description="Micro-batches per round.")
    batch_size: int = Field(1, ge=1, description="Samples per micro-batch and client.")
    aggregation_interval: int = Field(
        5, ge=1, description="Rounds between two aggregations; one more ends the run."
    )
    train_front: bool = Field(
        True,
        description="Clients train their layers. If not, no gradient is returned to them, and each "
        "sample's activations are sent once and kept by the server.",
    )
    aggregate: bool = Field(
        True, description="Clients' adapters are averaged; if not, each keeps its own."
    )
    personal_layers: tuple[int, ...] = Field(
        (),
        description="Layers, counted from 0, whose adapters each client keeps to itself when the "
        "others are averaged.",
    )
    max_length: int = Field(1024, ge=2, description="Most tokens of one sequence.")
    mode: Literal["lockstep", "deadline"] = Field(
        "lockstep",
        description="Wait for every client, for always the same result; or leave late ones behind.",
    )
    quorum: int = Field(
        0,
        ge=0,
        description="deadline: clients that suffice when it has passed; 0: more than half.",
    )
    deadline_seconds: float = Field(
        60,
        gt=0,
        description="deadline: seconds that a step waits for the last; then the quorum suffices.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of every random draw of the run.")
    activation_encoding: Encoding = Field(
        "int8", description="How activations travel in training; raw is exact."
    )
    gradient_encoding: Encoding = Field("int8", description="How gradients travel; raw is exact.")
    inference_encoding: Encoding = Field(
        "raw", description="How activations travel when texts are written or scored; raw is exact."
    )
    adapter_encoding: AdapterEncoding = Field(
        "int8",
        description="How adapters travel to the aggregator and back: whole, or in so many bits a "
        "value what has changed since the last average.",
    )
    lora: LoraSpec = LoraSpec()
    loss: LossSpec = LossSpec()
    optimizer: OptimizerSpec = OptimizerSpec()

    @model_validator(mode="after")
    def _quorum_makes_sense(self) -> "RunOptions":
        if self.quorum > self.clients:
            raise ValueError(
                f"--quorum must be at most --clients ({self.clients}), got {self.quorum}"
            )
        return self

    @model_validator(mode="after")
    def _remembers_what_changes(self) -> "RunOptions":
        if self.loss.remembers_reference and not self.train_front:
            raise ValueError(
                "loss.reference_refresh is for clients that train; of those that do not, the "
                "server keeps both paths' activations: leave it at every_step, got "
                f"{self.loss.reference_refresh}"
            )
        return self

    @property
    def names_samples(self) -> bool:
        """Whether clients say which samples a micro-batch is of, for the server to hold some."""
        return self.loss.remembers_reference or not self.train_front

    @property
    def required(self) -> int:
        """Clients without which no step is taken."""
        if self.mode == "lockstep":
            return self.clients
        return self.quorum or self.clients // 2 + 1


class RunSpec(RunOptions):
    """One run, whole: the options and the model they meet."""

    model_name: str = Field(description="The base model's name, for the adapter's config.")
    front_fingerprint: str = Field(description="Fingerprint of the front's weights and config.")
    cut_layer: int = Field(ge=1, description="Number of decoder layers on the client.")

    def fingerprint(self) -> str:
        """`sha256:` and the hex digest of the spec's canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def fingerprint_of_clients(self) -> str:
        """What all clients of the run must have the same; each may call the model as it likes."""
        return self.model_copy(update={"model_name": ""}).fingerprint()

    @property
    def aggregates(self) -> bool:
        """Whether there is anything to average."""
        return self.aggregate and self.train_front

    def ends_interval(self, round_index: int) -> bool:
        """Whether a checkpoint is due after this round (counted from 0), and an aggregation."""
        done = round_index + 1
        return done % self.aggregation_interval == 0 or done == self.rounds

    def aggregates_after(self, round_index: int) -> bool:
        """Whether the adapters are averaged after this round (counted from 0)."""
        return self.aggregates and self.ends_interval(round_index)

    def aggregations_before(self, round_index: int) -> int:
        """How often the adapters have been averaged when this round begins."""
        if not self.aggregates:
            return 0
        whole = round_index // self.aggregation_interval
        return whole + (round_index == self.rounds and self.rounds % self.aggregation_interval > 0)
