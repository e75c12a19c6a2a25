"""The page that each service shows of itself at `/`, kept current by server-sent events."""

from lesft.live.curve import Curve
from lesft.live.page import PAGE_PATHS, LivePage

__all__ = ["PAGE_PATHS", "Curve", "LivePage"]
