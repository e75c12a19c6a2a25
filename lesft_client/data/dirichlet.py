"""Draws from a symmetric Dirichlet distribution, the same with every version of Python.

They are made from `random.Random(seed).random()` alone, as `order` explains;
`random.gammavariate` may change.
"""

import math
import random
from collections.abc import Callable

_LEAST_ALPHA = 1e-300
"""Below it, `log(u) / alpha` would be infinite; one client has it all long before."""


def dirichlet(seed: int, alpha: float, length: int) -> list[float]:
    """`length` proportions that add up to 1, drawn from Dirichlet(alpha, ..., alpha).

    Large alphas give nearly equal proportions, small ones give nearly all to one. The gammas that
    are normalized stay logarithms until then: with an alpha of 0.001 most of them would be zero.
    """
    assert alpha > 0
    draw = random.Random(seed).random
    logs = [_log_gamma_draw(draw, max(alpha, _LEAST_ALPHA)) for _ in range(length)]
    largest = max(logs)
    weights = [math.exp(log - largest) for log in logs]
    total = sum(weights)
    return [weight / total for weight in weights]


def _log_gamma_draw(draw: Callable[[], float], alpha: float) -> float:
    """The logarithm of a Gamma(alpha, 1) variate.

    Marsaglia and Tsang, A simple method for generating gamma variables, ACM TOMS 26(3), 2000;
    below 1, by their section 6: Gamma(alpha) is Gamma(alpha + 1) times u^(1 / alpha).
    """
    if alpha < 1:
        return _log_gamma_draw(draw, alpha + 1) + math.log(_above_zero(draw)) / alpha
    d = alpha - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        x = _normal_draw(draw)
        root = 1 + c * x
        if root <= 0:
            continue
        log_v = 3 * math.log(root)
        if math.log(_above_zero(draw)) < x * x / 2 + d * (1 - root**3 + log_v):
            return math.log(d) + log_v


def _normal_draw(draw: Callable[[], float]) -> float:
    """A standard normal variate by Marsaglia's polar method."""
    while True:
        x, y = 2 * draw() - 1, 2 * draw() - 1
        square = x * x + y * y
        if 0 < square < 1:
            return x * math.sqrt(-2 * math.log(square) / square)


def _above_zero(draw: Callable[[], float]) -> float:
    """A number in (0, 1], which has a logarithm."""
    return 1 - draw()
