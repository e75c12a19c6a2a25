"""What a client logs: on a device somebody looks at, only what they must know."""

from typing import Literal

from pydantic import Field

from lesft.logs import LogSettings


class ClientLogSettings(LogSettings):
    """What a client logs, and how."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="The least important messages that are logged."
    )
