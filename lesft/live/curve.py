"""The loss curve as the page draws it: of a long run, only so many rounds."""

from collections.abc import Sequence

from pydantic import BaseModel

MAX_POINTS = 500


class Curve(BaseModel):
    """Loss and NLL by round in nats; None where a round has no such figure."""

    rounds: list[int]
    """Numbers of the rounds shown, the first round being 1."""
    loss: list[float | None]
    nll: list[float | None]
    total: int
    """Rounds done. More than are shown where the curve was thinned."""

    @classmethod
    def of(cls, loss: Sequence[float | None], nll: Sequence[float | None]) -> "Curve":
        """The curve of figures by round, thinned where there are many."""
        kept = thinned(len(loss))
        return cls(
            rounds=[index + 1 for index in kept],
            loss=[loss[index] for index in kept],
            nll=[nll[index] for index in kept],
            total=len(loss),
        )


def thinned(count: int) -> list[int]:
    """Which of `count` points to show: evenly spaced, the first and the last among them.

    The spacing grows in steps, so that a growing curve mostly keeps the points that it has.
    """
    step = max(1, -(-(count - 1) // (MAX_POINTS - 1)))
    kept = list(range(0, count, step))
    if kept and kept[-1] != count - 1:
        kept.append(count - 1)
    return kept
