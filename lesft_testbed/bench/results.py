"""bench.json: every measurement, the figures made of them, and the machine they were made on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lesft.errors import InvalidInput

BENCH_FILE = "bench.json"


class Measurement(BaseModel):
    """One alternative, measured once. Each value's unit is in its name."""

    alternative: str
    repeat: int
    """Counted from 0."""
    values: dict[str, float]


class FigureResult(BaseModel):
    """A figure beside its target."""

    name: str
    what: str
    value: float
    """Made of the alternatives' medians over all repeats."""
    by_repeat: list[float]
    """Made of each repeat's values alone."""
    low: float
    """Smallest and largest of `by_repeat`."""
    high: float
    target: float
    at_least: bool
    """Whether the target is a lower bound; it is an upper one else."""
    met: bool
    """Whether `value` reaches the target."""


class Machine(BaseModel):
    """Where and with what a part was measured."""

    system: str
    processor: str
    cores: int
    memory_mib: int
    torch_threads: int
    """Of each process of the part."""
    load_average: tuple[float, float, float]
    """Of 1, 5 and 15 minutes, as the part began: others' work shows here."""
    versions: dict[str, str]


class PartResult(BaseModel):
    """One finished part."""

    name: str
    about: str
    settings: dict[str, Any]
    """All that it depends on; with others it must be measured again."""
    model: str
    """Its name, for people; empty where none is used."""
    began: str
    """Date and time, UTC."""
    seconds: float
    machine: Machine
    figures: list[FigureResult]
    measurements: list[Measurement]
    """In the order in which they were made."""

    def values(self, alternative: str, value: str) -> list[float]:
        """One value of one alternative, repeat by repeat."""
        return [m.values[value] for m in self.measurements if m.alternative == alternative]


class FailedPart(BaseModel):
    """A part that was asked for and could not be measured."""

    name: str
    reason: str


class BenchReport(BaseModel):
    """bench.json. Parts in the order in which they were measured."""

    parts: list[PartResult] = []
    failed: list[FailedPart] = []

    def part(self, name: str) -> PartResult | None:
        """A finished part; None where there is none of that name."""
        return next((part for part in self.parts if part.name == name), None)

    def with_part(self, result: PartResult) -> "BenchReport":
        """With a part new or in place of an older one."""
        others = [part for part in self.parts if part.name != result.name]
        failed = [part for part in self.failed if part.name != result.name]
        return BenchReport(parts=[*others, result], failed=failed)

    def with_failure(self, failure: FailedPart) -> "BenchReport":
        """With a failure; results of that part from before stay."""
        failed = [part for part in self.failed if part.name != failure.name]
        return BenchReport(parts=self.parts, failed=[*failed, failure])


def read_report(output: Path) -> BenchReport:
    """What is finished in a folder; nothing where there is no bench.json.

    Raises InvalidInput for a file that is not this command's.
    """
    path = output / BENCH_FILE
    try:
        return BenchReport.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return BenchReport()
    except ValidationError:
        raise InvalidInput(
            f"{path} cannot be read as this release's: give another --output, or remove it"
        ) from None


def difference(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting that differs, in words; empty where none does."""
    for name in sorted(recorded.keys() | wanted.keys()):
        before, now = recorded.get(name), wanted.get(name)
        if before != now:
            return f"{name} {before}, wanted {now}"
    return ""
