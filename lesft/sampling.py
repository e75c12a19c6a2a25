"""How the next token is chosen from logits, the same on either side of the cut.

A token's random draw depends on the seed and on the token's position alone: neither batching, nor
speculation, nor a connection that broke in between changes what comes out.
"""

from pydantic import BaseModel, ConfigDict, Field


class Sampling(BaseModel):
    """How tokens are chosen; the defaults always take the likeliest one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(
        0.0, ge=0, le=100, description="0 takes the likeliest token; higher draws more freely."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the likeliest tokens that hold this probability."
    )
    top_k: int = Field(0, ge=0, description="Draw from so many of the likeliest tokens; 0: all.")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="Above 1, tokens of prompt and answer become less likely."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of every draw.")


GREEDY = Sampling()
"""Always the likeliest token."""
