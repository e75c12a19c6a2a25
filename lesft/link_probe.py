"""What a measurement of the link may take: both ends keep to it. Loads no torch."""

from lesft.bundle import CHUNK_BYTES

MAX_PIECE_BYTES = CHUNK_BYTES
"""Of one message."""

MIN_CHARGE_BYTES = 1 << 14
"""What one message counts as at least, however small it is."""

MAX_PROBE_BYTES = 512 << 20
"""Of one call, in both directions together."""

MAX_PROBE_SECONDS = 60.0
"""Of one call: a link that is thinner than a kilobyte a second is not worth measuring."""


def charge(payload_bytes: int, answer_bytes: int) -> int:
    """What a message and its answer count as."""
    return max(payload_bytes + answer_bytes, MIN_CHARGE_BYTES)
