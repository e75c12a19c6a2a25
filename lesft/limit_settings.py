"""The settings by which a service keeps one client from taking what is the others'."""

from pydantic import BaseModel, Field


class CallLimits(BaseModel):
    """What clients may have under way at a service."""

    max_calls: int = Field(
        1000, ge=1, description="Calls of all clients together that may be under way."
    )
    max_calls_per_client: int = Field(
        100,
        ge=1,
        description="Calls of one client that may be under way; without TLS, of one connection.",
    )
    calls_per_second: float = Field(
        50,
        gt=0,
        description="Calls that one client may begin each second; without TLS, one connection.",
    )
