"""A run of two clients in the midst of a window, with everything that a bad message could spoil."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from lesft.micro_batch import StepKey
from lesft_server.run import RunState
from tests.harness import RunningServer, running_server, server_settings
from tests.server.harness import (
    RawSession,
    Snapshot,
    assert_serving,
    assert_unchanged,
    join,
    make_batch,
    raw_channel,
    snapshot,
    step_messages,
    wait_until,
)

MAX_LENGTH = 4096
NO_LEAVE = "its stream ended without leave (was it stopped, or its connection cut?)"


@contextmanager
def serving(
    model: Path, state: Path, clients: int = 2, **options: object
) -> Iterator[RunningServer]:
    """Two rounds of two micro-batches of up to two samples."""
    values: dict[str, Any] = {
        "accumulation": 2,
        "rounds": 2,
        "batch_size": 2,
        "max_length": MAX_LENGTH,
        "threads": 1,
    }
    with running_server(
        server_settings(model, state, clients=clients, **{**values, **options})
    ) as server:
        yield server


def step_all(sessions: list[RawSession], key: StepKey) -> None:
    """One step of all clients of a run."""
    for session in sessions:
        session.send(*step_messages(make_batch(key)))
    for session in sessions:
        assert session.receive_step().micro == key.micro


def wait_until_away(server: RunningServer, client_id: str) -> None:
    """Return once the server knows that a client is away."""
    wait_until(lambda: not server.engine.run.members[client_id].connected)


def waits_for(server: RunningServer) -> str:
    """What the run waits for, in words."""
    return server.engine.run.waiting_for(server.engine.cohort.due())


class MidRun:
    """A run whose clients a and b have trained on the first micro-batch of a window.

    So there are gradients in the adapters that a bad message could spoil. The second micro-batch of
    a is there too and waits for b's.
    """

    at = StepKey(0, 1)

    def __init__(self, server: RunningServer, channel: grpc.Channel) -> None:
        self.server = server
        self.channel = channel
        self.a, self.b = (join(channel, server.spec, name, instance_id=name) for name in "ab")
        step_all([self.a, self.b], StepKey(0, 0))
        self.before: Snapshot = snapshot(server)
        gradients = [gradient for _, gradient in self.before.values() if gradient is not None]
        assert any(bool(gradient.any()) for gradient in gradients)
        self.a.send(*step_messages(make_batch(self.at)))
        wait_until(lambda: server.engine.run.members["a"].next_key == StepKey(1, 0))

    def come_back(self, client_id: str, at: StepKey) -> RawSession:
        """Another session of a client that stands `at` a key."""
        return join(self.channel, self.server.spec, client_id, at, instance_id=client_id)

    def end_round(self) -> None:
        """b sends what is due, and both get their answers."""
        self.b.send(*step_messages(make_batch(self.at)))
        for session in (self.a, self.b):
            assert session.receive_step().micro == self.at.micro

    def assert_waits_for_b(self, why: str, undisturbed: Snapshot) -> None:
        """Only b's call has ended, nothing was applied, and with b back all is as it would be."""
        server, run = self.server, self.server.engine.run
        wait_until_away(server, "b")
        assert run.state is RunState.TRAINING
        assert run.members["b"].away_because == why
        assert waits_for(server) == f"client 'b' to come back ({why})"
        assert run.steps == 1
        assert_unchanged(server, self.before)
        assert_serving(server)

        self.b = self.come_back("b", self.at)
        self.end_round()
        assert [record.round for record in run.rounds] == [0]
        assert_unchanged(server, undisturbed)


@contextmanager
def starting_mid_run(model: Path, state: Path, **options: object) -> Iterator[MidRun]:
    """A server with such a run."""
    with serving(model, state, **options) as server, raw_channel(server.grpc) as channel:
        yield MidRun(server, channel)
