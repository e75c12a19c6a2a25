"""Rounds without a server: what the clients say, put together."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lesft.errors import RunStopped
from lesft_testbed import rounds
from lesft_testbed.processes import Processes
from lesft_testbed.rounds import RoundLog, merged_round
from lesft_testbed.watch import Watcher


def body(samples: int, losses: list[float | None], **more: Any) -> dict[str, Any]:
    """A client's status or result."""
    counts = [None if loss is None else [1, 2, samples] for loss in losses]
    nlls = [None if loss is None else 2 * loss for loss in losses]
    return {
        "num_samples": samples,
        "loss_by_round": losses,
        "nll_by_round": nlls,
        "class_counts_by_round": counts,
        **more,
    }


def test_a_round_is_the_mean_by_share_of_the_clients_that_took_part() -> None:
    bodies = [body(30, [1.0, 2.0]), body(10, [3.0, None])]
    first, second = (merged_round(bodies, index, 0.5) for index in range(2))
    assert first == {
        "round": 0,
        "loss": (30 * 1.0 + 10 * 3.0) / 40,
        "nll": (30 * 2.0 + 10 * 6.0) / 40,
        "class_counts": [2, 4, 40],
        "seconds": 0.5,
    }
    assert (second["loss"], second["nll"], second["class_counts"]) == (2.0, 4.0, [1, 2, 30])
    plain = {**body(5, [1.0]), "class_counts_by_round": [None]}
    assert merged_round([plain], 0, 0.5)["class_counts"] is None


def test_a_round_has_ended_when_all_clients_have_it_and_a_finished_one_is_read_from_its_result(
    tmp_path: Path,
) -> None:
    statuses: dict[str, Any] = {"a": None, "b": body(1, [1.0], phase="training")}
    clients = {
        name: SimpleNamespace(name=name, exit_status=None, state=tmp_path / name) for name in "ab"
    }
    watcher = SimpleNamespace(get=lambda process, path: statuses[process.name])
    processes = SimpleNamespace(all=dict[str, Any]())
    log = RoundLog(cast(Processes, processes), cast(Watcher, watcher), ["a", "b"], split=False)
    assert log.new() == []  # none has been started
    processes.all = clients
    assert log.new() == []  # a does not answer yet
    statuses["a"] = body(1, [3.0, 4.0], phase="training")
    assert [record["loss"] for record in log.new()] == [2.0]
    assert log.new() == []
    clients["b"].exit_status = 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_text(json.dumps(body(1, [1.0, 2.0])))
    assert [(record["round"], record["loss"]) for record in log.new()] == [(1, 3.0)]
    assert [record["round"] for record in log.records] == [0, 1]
    assert log.records[0]["seconds"] == pytest.approx(0, abs=5)


def test_a_server_that_is_slow_to_answer_at_the_end_is_asked_until_it_has_told_all_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "_LAST_PAUSE_SECONDS", 0)
    answers: list[Any] = [[{"round": 0}], None, None, [{"round": 1}], None, [{"round": 2}]]
    asked: list[str] = []

    def get(process: object, path: str) -> Any:
        asked.append(path)
        return answers.pop(0) if answers else None

    processes = SimpleNamespace(all={"server": None})
    watcher = SimpleNamespace(get=get)
    log = RoundLog(cast(Processes, processes), cast(Watcher, watcher), ["a"], split=True)
    log.new()
    assert log.rest(3) == [{"round": 1}, {"round": 2}]
    assert asked[-1] == "/v1/rounds?first=2"
    assert len(asked) == 6
    with pytest.raises(RunStopped, match="finished 5 rounds, but figures of 3 only could be had"):
        log.rest(5)
