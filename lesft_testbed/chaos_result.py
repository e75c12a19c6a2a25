"""What came of a chaos run: compared with the undisturbed run, as chaos.json and as a table."""

import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel

from lesft.files import write_atomically
from lesft_testbed.chaos_plan import Fault
from lesft_testbed.settings import ChaosSettings

CHAOS_FILE = "chaos.json"

_DIGEST_SHOWN = 12
_PACKAGES = ("lesft", "torch", "transformers", "peft", "grpcio", "safetensors")


@dataclass
class InjectedFault:
    """A fault as it came."""

    fault: Fault
    at_round: int
    """Rounds done when it came."""
    seconds: float
    """Since the start of the run."""
    recovery_seconds: float = 0.0
    """Until the run had got over it; see `goal_steps`."""
    alone: bool = True
    """Whether no other fault came before the run had got over it."""

    @property
    def kind(self) -> str:
        """kill server, kill aggregator, kill client, cut, delay or half_open."""
        if self.fault.kind != "kill":
            return self.fault.kind
        return f"kill {self.fault.target.partition('-')[0]}"


@dataclass
class Outcome:
    """What one run left."""

    adapters: dict[str, str]
    """SHA-256 of each service's adapter file."""
    versions: list[str]
    """SHA-256 of all averaged adapters, the first published first."""
    losses: dict[str, list[float]]
    """Each client's loss by round."""
    steps_applied: int
    """Micro-batches of the cohort that the final model has gone through."""
    lineage: str
    """The server's SHA-256 chain over them: their keys and what the clients sent."""
    round_seconds: list[float]
    seconds: float
    faults: Sequence[InjectedFault] = ()
    faults_left: int = 0
    """Planned faults for which the run ended too early."""


class Recovery(BaseModel):
    """Recovery from all faults of one kind, in seconds."""

    count: int
    min: float
    median: float
    max: float
    count_alone: int
    """Faults during whose recovery no other came: only theirs is all their own."""
    median_alone: float | None


class FaultBody(BaseModel):
    """One fault, in the order they came. Seconds are since the run's start."""

    kind: str
    target: str
    description: str
    at_round: int
    seconds: float
    recovery_seconds: float
    alone: bool


class ChaosReport(BaseModel):
    """chaos.json."""

    adapters_identical: bool
    differences: list[str]
    """Everything that a fault has changed; empty when the run came out the same."""
    seed: int
    kills: int
    kills_by_service: dict[str, int]
    cuts: int
    """Faults of links, of all kinds."""
    faults_left: int
    """Planned faults for which the run ended too early."""
    rounds: int
    steps: int
    """Steps of the cohort, rounds x accumulation, that the final model is to have."""
    steps_repeated: int
    """Steps that it has gone through beyond them."""
    steps_lost: int
    recovery_seconds: dict[str, Recovery]
    """By kind: from the fault until the first step after the round that was under way, or after
    the next aggregation where the fault concerns the aggregator; undisturbed rounds in between
    count too."""
    round_seconds: float
    """Median length of an undisturbed round."""
    seconds: dict[str, float]
    """Length of both runs."""
    faults: list[FaultBody]
    versions: dict[str, str]


def adapter_differences(chaos: Outcome, undisturbed: Outcome) -> list[str]:
    """All adapters that are not the same, bit for bit, a line each."""
    found: list[str] = []
    for run, outcome in (("the chaos run", chaos), ("the undisturbed run", undisturbed)):
        fronts = {name: outcome.adapters[name] for name in outcome.losses}
        if len(set(fronts.values())) > 1:
            found.append(f"the clients of {run} hold different adapters: {_digests(fronts)}")
    for name, expected in undisturbed.adapters.items():
        found += _digest_difference(f"{name}'s adapter", chaos.adapters[name], expected)
    published, expected_number = len(chaos.versions), len(undisturbed.versions)
    if published != expected_number:
        found.append(
            f"the aggregator published {published} versions, undisturbed {expected_number}"
        )
    pairs = zip(chaos.versions, undisturbed.versions, strict=False)
    for number, (digest, expected) in enumerate(pairs, start=1):
        found += _digest_difference(f"version {number} of the aggregator", digest, expected)
    return found


def step_differences(chaos: Outcome, undisturbed: Outcome, steps: int) -> list[str]:
    """Losses that are not exactly the same, and steps that are not the run's, a line each."""
    found: list[str] = []
    for name, expected in undisturbed.losses.items():
        losses = chaos.losses[name]
        if len(losses) != len(expected):
            found.append(f"{name} recorded {len(losses)} losses, undisturbed {len(expected)}")
            continue
        pairs = enumerate(zip(losses, expected, strict=True), start=1)
        first = next(((n, a, b) for n, (a, b) in pairs if a != b), None)
        if first is not None:
            number, loss, other = first
            found.append(
                f"{name}'s loss differs from round {number} on: {loss!r}, undisturbed {other!r}"
            )
    for run, applied in (
        ("chaos", chaos.steps_applied),
        ("undisturbed", undisturbed.steps_applied),
    ):
        if applied != steps:
            found.append(f"the {run} run's model has gone through {applied} steps, not {steps}")
    return [*found, *_digest_difference("the lineage", chaos.lineage, undisturbed.lineage)]


def make_chaos_report(settings: ChaosSettings, chaos: Outcome, undisturbed: Outcome) -> ChaosReport:
    """The report of both runs."""
    steps = settings.rounds * settings.accumulation
    different_adapters = adapter_differences(chaos, undisturbed)
    killed = Counter(each.fault.target for each in chaos.faults if each.fault.kind == "kill")
    return ChaosReport(
        adapters_identical=not different_adapters,
        differences=[*different_adapters, *step_differences(chaos, undisturbed, steps)],
        seed=settings.seed,
        kills=killed.total(),
        kills_by_service=dict(sorted(killed.items())),
        cuts=len(chaos.faults) - killed.total(),
        faults_left=chaos.faults_left,
        rounds=settings.rounds,
        steps=steps,
        steps_repeated=max(0, chaos.steps_applied - steps),
        steps_lost=max(0, steps - chaos.steps_applied),
        recovery_seconds=_recoveries(chaos.faults),
        round_seconds=statistics.median(undisturbed.round_seconds),
        seconds={"chaos": chaos.seconds, "undisturbed": undisturbed.seconds},
        faults=[_fault_body(each) for each in chaos.faults],
        versions={"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
    )


def write_chaos_report(report: ChaosReport, output: Path) -> None:
    """Write chaos.json, whole or not at all."""
    write_atomically(output / CHAOS_FILE, (report.model_dump_json(indent=2) + "\n").encode())


def chaos_table(report: ChaosReport) -> str:
    """What the command prints at its end."""
    kills = ", ".join(f"{name} {count}" for name, count in report.kills_by_service.items())
    lines = [
        f"{report.rounds} rounds in {report.seconds['chaos']:.0f} s, undisturbed "
        f"{report.seconds['undisturbed']:.0f} s ({report.round_seconds:.2f} s a round)",
        f"{report.kills} kills{f' ({kills})' if kills else ''}, {report.cuts} faults of links",
        f"of {report.steps} steps {report.steps_repeated} were applied twice, "
        f"{report.steps_lost} lost",
    ]
    heads = ("count", "min", "median", "max", "alone", "median")
    lines += ["", "seconds to recover  " + "".join(f"{head:>8}" for head in heads)]
    lines += [
        f"{kind.replace('_', ' '):<20}{each.count:>8}{each.min:>8.1f}{each.median:>8.1f}"
        f"{each.max:>8.1f}{each.count_alone:>8}"
        + ("" if each.median_alone is None else f"{each.median_alone:>8.1f}")
        for kind, each in report.recovery_seconds.items()
    ]
    same = "identical" if report.adapters_identical else "DIFFERENT"
    lines += ["", f"adapters of both runs: {same}, bit for bit"]
    return "\n".join(lines)


def _recoveries(faults: Sequence[InjectedFault]) -> dict[str, Recovery]:
    kinds = sorted({each.kind for each in faults})
    return {kind: _recovery([each for each in faults if each.kind == kind]) for kind in kinds}


def _recovery(faults: Sequence[InjectedFault]) -> Recovery:
    seconds = [each.recovery_seconds for each in faults]
    alone = [each.recovery_seconds for each in faults if each.alone]
    return Recovery(
        count=len(seconds),
        min=min(seconds),
        median=statistics.median(seconds),
        max=max(seconds),
        count_alone=len(alone),
        median_alone=statistics.median(alone) if alone else None,
    )


def _fault_body(injected: InjectedFault) -> FaultBody:
    return FaultBody(
        kind=injected.fault.kind,
        target=injected.fault.target,
        description=injected.fault.describe(),
        at_round=injected.at_round,
        seconds=injected.seconds,
        recovery_seconds=injected.recovery_seconds,
        alone=injected.alone,
    )


def _digests(digests: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {digest[:_DIGEST_SHOWN]}" for name, digest in digests.items())


def _digest_difference(what: str, digest: str, expected: str) -> list[str]:
    if digest == expected:
        return []
    return [f"{what} differs: {_digests({'chaos': digest, 'undisturbed': expected})}"]
