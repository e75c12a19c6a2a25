"""What varies in a comparison: its places along each axis, and which methods are shown together."""

from dataclasses import dataclass
from typing import Literal

from lesft_testbed.comparison.plan import UNTUNED, Place, short_name
from lesft_testbed.comparison.presets import SIX_SYSTEMS
from lesft_testbed.comparison.results import Comparison

Axis = Literal["samples", "cut", "clients"]
AXES: dict[Axis, str] = {
    "samples": "samples per client",
    "cut": "part of the layers on the client",
    "clients": "number of clients",
}
_RIVALS = (*SIX_SYSTEMS, "dft")


@dataclass(frozen=True)
class Series:
    """Places that differ in one axis only, in its order."""

    axis: Axis
    title: str
    places: list[Place]

    @property
    def values(self) -> list[str]:
        """Where each place lies on the axis."""
        return [str(getattr(place, self.axis)) for place in self.places]


def series_along(comparison: Comparison, axis: Axis) -> list[Series]:
    """The series along an axis that has several values; none for another.

    With a fixed total, the samples per client go with the number of clients and are no axis.
    """
    total = comparison.settings.get("total_samples", 0)
    others = [name for name in ("cut", "samples", "clients") if name != axis]
    if total:
        if axis == "samples":
            return []
        others.remove("samples")
    groups: dict[tuple[str, ...], list[Place]] = {}
    for place in comparison.places:
        key = (place.model, place.data, *(str(getattr(place, name)) for name in others))
        groups.setdefault(key, []).append(place)
    return [
        Series(
            axis, _title(places[0], others, total), sorted(places, key=lambda p: _order(p, axis))
        )
        for places in groups.values()
        if len(places) > 1
    ]


def _title(place: Place, others: list[str], total: int) -> str:
    fixed = {
        "cut": f"cut {place.cut}",
        "samples": f"{place.samples} samples a client",
        "clients": f"{place.clients} clients",
    }
    parts = [fixed[name] for name in others] + ([f"{total} samples in all"] if total else [])
    return f"{where(place)}: {', '.join(parts)}"


def _order(place: Place, axis: Axis) -> float:
    if axis == "cut":
        return 1 / int(place.cut[2:]) if "/" in place.cut else float(place.cut)
    return float(getattr(place, axis))


def where(place: Place) -> str:
    """Model and data of a place."""
    return f"{short_name(place.model)} on {short_name(place.data)}"


def described(place: Place) -> str:
    """All of a place, for a heading."""
    return (
        f"{where(place)}: {place.clients} {'client' if place.clients == 1 else 'clients'}, "
        f"{place.samples} samples each, cut {place.cut}"
    )


def rivals(comparison: Comparison) -> list[str]:
    """The untuned model and the whole systems among the methods.

    None where one of them stands among its ablations only.
    """
    found = [method for method in comparison.methods if method in (*UNTUNED, *_RIVALS)]
    alone = len(set(found) - set(UNTUNED)) < 2
    return [] if alone and ablations(comparison) else found


def ablations(comparison: Comparison) -> list[str]:
    """The untuned model, the reference and its ablations; none where there are no ablations."""
    found = [method for method in comparison.methods if method not in (*UNTUNED, *_RIVALS)]
    if not found:
        return []
    shown = {*found, *UNTUNED, comparison.reference}
    return [method for method in comparison.methods if method in shown]
