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
    mcnemar: McNemar | None = None
    """For accuracy: over the questions of these seeds, each once, the trained adapters taken as
    given."""
    repeated_questions: int = 0
    """Left out of `mcnemar`: asked before, by an earlier seed mostly."""


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
    same_as: dict[str, str]
    """Methods that are another one under a second name, which is named: they have the same runs."""
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
    same_as = _same_methods(plan, reference)
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
        different = {name: runs for name, runs in by_method.items() if name not in same_as}
        for measure in HIGHER_IS_BETTER:
            tests += _family(place, measure, reference, different)
    return Comparison(
        settings=settings,
        reference=reference,
        places=list(plan.places),
        methods=list(plan.methods),
        same_as=same_as,
        runs=[finished[run.name].figures for run in plan.runs if run.name in finished],
        missing=list(missing),
        cells=cells,
        tests=tests,
    )


def _same_methods(plan: Plan, reference: str) -> dict[str, str]:
    """Methods whose runs are another's: the reference's, or else the first one's that has them."""
    owners: dict[tuple[str, ...], str] = {}
    same_as = {}
    for method in (reference, *plan.methods):
        runs = tuple(name for (_, shown, _), name in plan.shown.items() if shown == method)
        owner = owners.setdefault(runs, method)
        if owner != method:
            same_as[method] = owner
    return same_as


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
            **(_by_question(by_method[method], theirs, seeds) if measure == "accuracy" else {}),
        )
        for (method, seeds, values), p, corrected in zip(
            found, p_values, holm(p_values), strict=True
        )
    ]


def _by_question(
    ours: Mapping[int, FinishedRun], theirs: Mapping[int, FinishedRun], seeds: Sequence[int]
) -> dict[str, Any]:
    """McNemar's test over all seeds' questions. The same one again is no further evidence: it
    counts once, for the first seed that asks it."""
    pairs: dict[tuple[int, int] | str, tuple[bool, bool]] = {}
    repeated = 0
    for seed in seeds:
        asked = {each.index: each for each in theirs[seed].questions}
        for each in ours[seed].questions:
            other = asked.get(each.index)
            if each.right is None or other is None or other.right is None:
                continue
            # By the reference's prompt: few-shot's has its examples in it. Without a digest, as in
            # files of before there was one, the seeds' questions are taken as different.
            question = other.prompt or (seed, each.index)
            repeated += question in pairs
            pairs.setdefault(question, (each.right, other.right))
    return {"mcnemar": mcnemar(pairs.values()), "repeated_questions": repeated}
