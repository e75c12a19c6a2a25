"""The table of parts: what `lesft-testbed bench` can measure. A new part is a file and a line here.

A part that has settings of its own has a field of its name in `BenchSettings`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lesft.commands import load

if TYPE_CHECKING:
    from lesft_testbed.bench.part import Part

_FOLDER = "lesft_testbed.bench"

PARTS: Mapping[str, str] = {
    "overhead": f"{_FOLDER}.overhead:Overhead",
    "wire": f"{_FOLDER}.wire:Wire",
    "aggregate": f"{_FOLDER}.aggregate:Aggregate",
    "wan": f"{_FOLDER}.wan:Wan",
    "batching": f"{_FOLDER}.batching:Batching",
    "scale": f"{_FOLDER}.scale:Scale",
    "decode": f"{_FOLDER}.decode:Decode",
    "memory": f"{_FOLDER}.memory:Memory",
}
"""Name to class, as `module:name`; loaded when it is measured."""


def make_part(name: str) -> "Part":
    """The part of this name."""
    part: Part = load(PARTS[name])()
    return part
