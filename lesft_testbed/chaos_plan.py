"""What goes wrong in a chaos run, and when: drawn from a seed before the run begins."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from typing import Literal, TypeVar

from lesft_testbed.commands import client_name
from lesft_testbed.settings import ChaosSettings

FaultKind = Literal["kill", "cut", "delay", "half_open"]

AGGREGATOR = "aggregator"
SERVER = "server"

_LINK_FAULTS: tuple[FaultKind, ...] = ("cut", "half_open", "delay")
_AIMED_SHARE = 1 / 3
"""Of the faults that may come at any round, those that are put at the end of a window, where
adapters are submitted, averaged and everything is saved."""

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """One fault. Times are seconds."""

    at_round: int
    """Comes once so many rounds are done ..."""
    into_round: float
    """... and so much of the next one, as a share of a typical round."""
    kind: FaultKind
    target: str
    """A service, or a link written as client-0 -> server."""
    seconds: float
    """Until the killed service is started again, or for so long new connections are refused, bytes
    held back, the link half open."""
    held_seconds: float = 0.0
    """For how long a delay holds each byte back."""
    direction: Literal["up", "down", "both"] = "both"
    """What a half-open link swallows."""
    new_connections: bool = True
    """Whether a half-open link lets new connections work at once."""

    @property
    def concerns_aggregator(self) -> bool:
        """Whether nobody notices before the adapters are averaged next."""
        return self.target.endswith(AGGREGATOR)

    def describe(self) -> str:
        """For a progress line."""
        if self.kind == "kill":
            return f"killed {self.target}"
        if self.kind == "cut":
            return f"cut {self.target} for {self.seconds:.1f} s"
        if self.kind == "delay":
            return f"delayed {self.target} by {self.held_seconds:.1f} s for {self.seconds:.1f} s"
        ways = {"up": "upwards", "down": "downwards", "both": "both ways"}[self.direction]
        return f"half-opened {self.target} {ways}"


def link_name(client: str, service: str) -> str:
    """The link from a client to a service."""
    return f"{client} -> {service}"


def make_plan(settings: ChaosSettings) -> list[Fault]:
    """All faults of a run in their order; the same settings give the same.

    Kills go round the kinds of services and the clients, link faults round the kinds of faults and
    the links, so that none is left out by chance.
    """
    draw = random.Random(f"chaos {settings.seed}")
    clients = [client_name(index) for index in range(settings.clients)]
    links = [link_name(client, to) for client in clients for to in (SERVER, AGGREGATOR)]
    next_client, next_link = _shuffled_rounds(draw, clients), _shuffled_rounds(draw, links)
    victims = cycle((repeat(SERVER), next_client, repeat(AGGREGATOR), next_client))
    faults = [_kill(draw, settings, next(next(victims))) for _ in range(settings.kills)]
    faults += [
        _link_fault(draw, settings, _LINK_FAULTS[index % len(_LINK_FAULTS)], next(next_link))
        for index in range(settings.cuts)
    ]
    return sorted(faults, key=lambda fault: (fault.at_round, fault.into_round))


def _kill(draw: random.Random, settings: ChaosSettings, service: str) -> Fault:
    at_round, into_round = _moment(draw, settings, service)
    return Fault(at_round, into_round, "kill", service, seconds=draw.random())


def _link_fault(draw: random.Random, settings: ChaosSettings, kind: FaultKind, link: str) -> Fault:
    at_round, into_round = _moment(draw, settings, link)
    if kind == "cut":
        seconds = draw.choice((0.0, draw.uniform(0.1, 1.0)))
        return Fault(at_round, into_round, kind, link, seconds)
    if kind == "delay":
        seconds, held = draw.uniform(0.5, 2.0), draw.uniform(0.1, 0.5)
        return Fault(at_round, into_round, kind, link, seconds, held_seconds=held)
    return Fault(
        at_round,
        into_round,
        kind,
        link,
        seconds=draw.uniform(0.5, 3.0),
        direction=draw.choice(("up", "down", "both")),
        new_connections=draw.random() < 0.75,
    )


def _moment(draw: random.Random, settings: ChaosSettings, target: str) -> tuple[int, float]:
    """Not before the first round is done, when all are still starting, nor in the last tenth."""
    last = settings.rounds - max(2, settings.rounds // 10)
    at_round, into_round = draw.randint(1, last), draw.random()
    ends = range(settings.aggregation_interval, last + 1, settings.aggregation_interval)
    aimed = draw.random() < _AIMED_SHARE or target.endswith(AGGREGATOR)
    return (draw.choice(ends) if ends and aimed else at_round), into_round


def _shuffled_rounds(draw: random.Random, values: Sequence[T]) -> Iterator[T]:
    """All values in random order, then all again in another."""
    while True:
        yield from draw.sample(values, len(values))
