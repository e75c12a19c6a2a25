"""comparison.json: every run's figures, cells over seeds, and the methods tested by pairs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from lesft_testbed.comparison.figures import FinishedRun, RunFigures
from lesft_testbed.comparison.plan import Place, Plan
from lesft_testbed.comparison.statistics import (
    Estimate,
    McNemar,
    Verdict,
    estimate,
    holm,
    mcnemar,
    paired_t_test,
    verdict,
)

Measure = Literal["accuracy", "nll"]
HIGHER_IS_BETTER: Mapping[Measure, bool] = {"accuracy": True, "nll": False}

_FIGURE: Mapping[Measure, Callable[[RunFigures], float | None]] = {
    "accuracy": lambda figures: figures.accuracy,
    "nll": lambda figures: figures.nll_per_token,
}


class Cell(BaseModel):
    """One method at one place, over its seeds."""

    place: Place
    method: str
    runs: list[str]
    """Names of the finished runs, in the order of the seeds."""
    seeds: list[int]
    accuracy: Estimate | None
    nll: Estimate | None
    wire: dict[str, dict[str, float]]
    """Bytes of all clients by kind, up and down: the mean over seeds."""

    def estimate(self, measure: Measure) -> Estimate | None:
        """Its estimate by a measure; None where that was not asked for."""
        return self.accuracy if measure == "accuracy" else self.nll

    @property
    def total_bytes(self) -> float:
        """Bytes of all kinds, both ways."""
        return sum(size for ways in self.wire.values() for size in ways.values())


class PairedTest(BaseModel):
    """One method against the reference at one place, by one measure, paired by seed."""

    place: Place
    measure: Measure
    method: str
    reference: str
    seeds: list[int]
    difference: Estimate
    """Method minus reference."""
    p: float | None
    """Paired t-test; null where it could not be made."""
    p_holm: float | None
    """Corrected over the family: all methods at this place, by this measure."""
    family: int
    verdict: Verdict
    mcnemar: McNemar | None
    """For accuracy: over the questions of these seeds, the trained adapters taken as given."""


class Missing(BaseModel):
    """A planned run without results."""

    name: str
    reason: str


class Comparison(BaseModel):
    """comparison.json. Figures in nats and bytes; what differs each time is under `measured`."""

    settings: dict[str, Any]
    reference: str
    places: list[Place]
    methods: list[str]
    runs: list[RunFigures]
    missing: list[Missing]
    cells: list[Cell]
    tests: list[PairedTest]

    def cell(self, place: Place, method: str) -> Cell | None:
        """The cell of a place and method; None when none of its runs is finished."""
        return next((c for c in self.cells if c.place == place and c.method == method), None)

    @property
    def measures(self) -> list[Measure]:
        """What was measured at all."""
        return [
            measure
            for measure in HIGHER_IS_BETTER
            if any(cell.estimate(measure) for cell in self.cells)
        ]

    def test(self, place: Place, method: str, measure: Measure) -> PairedTest | None:
        """The test of a method at a place; None for the reference itself."""
        found = (
            t for t in self.tests if (t.place, t.method, t.measure) == (place, method, measure)
        )
        return next(found, None)


def make_comparison(
    settings: dict[str, Any],
    reference: str,
    plan: Plan,
    finished: Mapping[str, FinishedRun],
    missing: Sequence[Missing],
) -> Comparison:
    """The comparison of the runs that are finished, by their names."""
    seeds = sorted({run.seed for run in plan.runs})
    cells, tests = [], []
    for place in plan.places:
        by_method = {
            method: {
                seed: finished[name]
                for seed in seeds
                if (name := plan.shown[place, method, seed]) in finished
            }
            for method in plan.methods
        }
        cells += [_cell(place, method, runs) for method, runs in by_method.items() if runs]
        for measure in HIGHER_IS_BETTER:
            tests += _family(place, measure, reference, by_method)
    return Comparison(
        settings=settings,
        reference=reference,
        places=list(plan.places),
        methods=list(plan.methods),
        runs=[finished[run.name].figures for run in plan.runs if run.name in finished],
        missing=list(missing),
        cells=cells,
        tests=tests,
    )


def _cell(place: Place, method: str, runs: Mapping[int, FinishedRun]) -> Cell:
    figures = [run.figures for run in runs.values()]
    return Cell(
        place=place,
        method=method,
        runs=[each.name for each in figures],
        seeds=list(runs),
        accuracy=_estimate("accuracy", figures),
        nll=_estimate("nll", figures),
        wire=_mean_wire(figures),
    )


def _estimate(measure: Measure, figures: Sequence[RunFigures]) -> Estimate | None:
    values = [value for each in figures if (value := _FIGURE[measure](each)) is not None]
    return estimate(values) if values else None


def _mean_wire(figures: Sequence[RunFigures]) -> dict[str, dict[str, float]]:
    return {
        kind: {
            way: sum(each.wire[kind][way] for each in figures) / len(figures)
            for way in figures[0].wire[kind]
        }
        for kind in figures[0].wire
    }


def _family(
    place: Place,
    measure: Measure,
    reference: str,
    by_method: Mapping[str, Mapping[int, FinishedRun]],
) -> list[PairedTest]:
    """All methods at a place against the reference, corrected together."""
    theirs = by_method[reference]
    found = []
    for method, ours in by_method.items():
        if method == reference:
            continue
        differences = {
            seed: mine - other
            for seed in ours.keys() & theirs.keys()
            if (mine := _FIGURE[measure](ours[seed].figures)) is not None
            and (other := _FIGURE[measure](theirs[seed].figures)) is not None
        }
        if differences:
            seeds = sorted(differences)
            found.append((method, seeds, [differences[seed] for seed in seeds]))
    p_values = [paired_t_test(values) for _, _, values in found]
    return [
        PairedTest(
            place=place,
            measure=measure,
            method=method,
            reference=reference,
            seeds=seeds,
            difference=(difference := estimate(values)),
            p=p,
            p_holm=corrected,
            family=len(found),
            verdict=verdict(difference.mean, corrected, HIGHER_IS_BETTER[measure]),
            mcnemar=_by_question(by_method[method], theirs, seeds)
            if measure == "accuracy"
            else None,
        )
        for (method, seeds, values), p, corrected in zip(
            found, p_values, holm(p_values), strict=True
        )
    ]


def _by_question(
    ours: Mapping[int, FinishedRun], theirs: Mapping[int, FinishedRun], seeds: Sequence[int]
) -> McNemar:
    pairs = []
    for seed in seeds:
        right = {each.index: each.right for each in theirs[seed].questions}
        pairs += [
            (each.right, other)
            for each in ours[seed].questions
            if each.right is not None and (other := right.get(each.index)) is not None
        ]
    return mcnemar(pairs)
