"""A part of the bench: alternatives that are measured by turns, and figures made of them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lesft_testbed.bench.settings import BenchSettings

Values = Mapping[str, Mapping[str, float]]
"""Alternative, name of the value, value: of one repeat, or medians over all."""


@dataclass(frozen=True)
class Alternative:
    """One of the things compared; `measure` measures it once and names each value with its unit."""

    name: str
    measure: Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Figure:
    """A number made of the alternatives' values, and where it should lie."""

    name: str
    what: str
    """What over what, in words."""
    compute: Callable[[Values], float]
    target: float
    at_least: bool = False
    """Whether the target is a lower bound; it is an upper one else."""

    def is_met(self, value: float) -> bool:
        """Whether a value reaches the target."""
        return value >= self.target if self.at_least else value <= self.target


@dataclass(frozen=True)
class Bench:
    """What a part may use: the settings, the model's folder, a folder for jobs' results and logs.

    `scratch` is empty at the part's beginning and gone after its end.
    """

    settings: BenchSettings
    model: str
    output: Path
    scratch: Path
    versions: dict[str, str] = field(default_factory=dict)
    """Of what the part uses and this Python has not; the part adds to it."""


class Part(Protocol):
    """One part; it is made new for each run of the command."""

    name: str
    about: str
    """What is compared, in one sentence."""
    figures: Sequence[Figure]
    depends_on: Sequence[str]
    """Names of the settings common to all parts that it uses; its own are known by its name."""
    is_exact: bool
    """Whether it comes out the same each time, so that once is enough."""

    def alternatives(self, bench: Bench) -> AbstractContextManager[Sequence[Alternative]]:
        """What is measured, in this order; the block's end clears away what was made for it.

        Raises LesftError, also from measuring, when it cannot be done.
        """


def ratio(over: str, under: str, value: str) -> Callable[[Values], float]:
    """One alternative's value divided by another's."""
    return lambda values: values[over][value] / values[under][value]
