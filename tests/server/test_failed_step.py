"""Nothing that comes after a failure counts: the run goes on from before it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lesft.back import Back
from lesft.micro_batch import StepKey
from lesft_server.ledger import Entry, Ledger
from lesft_server.run import RunState
from tests.harness import RunningServer
from tests.server.harness import (
    join,
    make_batch,
    raw_channel,
    step_messages,
    wait_until,
)
from tests.server.mid_run import serving, step_all

FIRST, SECOND = StepKey(0, 0), StepKey(0, 1)


def failing_when(
    original: Callable[..., Any], fails: Callable[..., bool], error: Exception
) -> Callable[..., Any]:
    def failing(*args: Any) -> Any:
        if fails(*args):
            raise error
        return original(*args)

    return failing


@pytest.mark.parametrize("rounds", [2, 1])
@pytest.mark.parametrize("what", ["a step", "the ledger"])
def test_a_step_that_waits_for_one_that_fails_leaves_nothing_behind(
    what: str, rounds: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step is the last of its round, after which there is a checkpoint."""
    servers: list[RunningServer] = []

    def step_fails(_: Back, key: StepKey, __: Sequence[object]) -> bool:
        wait_until(lambda: servers[0].engine.cohort._to_begin > SECOND)
        return key == FIRST

    def ledger_fails(_: Ledger, entries: Sequence[Entry]) -> bool:
        wait_until(lambda: servers[0].engine.run.steps == 2)
        return entries[0].header.micro == FIRST.micro

    with (
        serving(model, tmp_path, rounds=rounds) as server,
        raw_channel(server.grpc) as channel,
        monkeypatch.context() as patch,
    ):
        servers.append(server)
        if what == "a step":
            failing = failing_when(Back.train_step, step_fails, RuntimeError("out of memory"))
            patch.setattr(Back, "train_step", failing)
        else:
            failing = failing_when(Ledger.append, ledger_fails, OSError("input/output error"))
            patch.setattr(Ledger, "append", failing)
        sessions = [join(channel, server.spec, name, instance_id=name) for name in "ab"]
        for session in sessions:
            for key in (FIRST, SECOND):
                session.send(*step_messages(make_batch(key)))
        for session in sessions:
            session.refusal()
        wait_until(lambda: not server.engine.cohort._tasks)
        assert server.engine.run.state is RunState.STOPPED
        assert server.engine.journal.newest is None
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "adapter.safetensors").exists()
    with serving(model, tmp_path, rounds=rounds) as server, raw_channel(server.grpc) as channel:
        sessions = [join(channel, server.spec, name, at=FIRST, instance_id=name) for name in "ab"]
        for key in (FIRST, SECOND):
            step_all(sessions, key)
        assert server.engine.run.steps == 2
