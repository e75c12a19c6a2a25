"""A confidence interval for a share of successes, such as an accuracy."""

import math

_STANDARD_ERRORS_OF_95_PERCENT = 1.959963984540054


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson, JASA 22, 1927), of `count` >= 1 trials."""
    z = _STANDARD_ERRORS_OF_95_PERCENT
    share = right / count
    center = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)
