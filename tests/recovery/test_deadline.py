"""Runs with a deadline: they go on without those who are late, and take them back."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.recovery.harness import CLIENTS, SECONDS, Disturbance, Run, Zygote, new_run

DEADLINE_SECONDS = 0.7
SLOW_CLIENT: Disturbance = ("lesft_client.front:Front.forward", "slow", 1000)


@pytest.fixture
def run(zygote: Zygote, model: Path, tmp_path: Path) -> Iterator[Run]:
    """Two clients, of which one suffices."""
    with new_run(
        zygote, tmp_path, model, quorum=1, deadline_seconds=DEADLINE_SECONDS, mode="deadline"
    ) as run:
        yield run


def result(run: Run, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run.folder / name / "result.json").read_text())
    return values


def test_when_nobody_is_late_it_is_the_same_run_as_in_lockstep(
    zygote: Zygote, model: Path, tmp_path: Path
) -> None:
    outcomes = []
    for mode, options in (("lockstep", {}), ("deadline", {"deadline_seconds": 60})):
        with new_run(zygote, tmp_path / mode, model, mode=mode, **options) as run:
            run.start_all()
            outcomes.append(run.finish())
    assert outcomes[0] == outcomes[1]


def test_a_slow_client_is_left_behind_and_taken_back_and_the_shares_follow(run: Run) -> None:
    run.start_all(b=SLOW_CLIENT)
    for name in CLIENTS:
        assert run.wait(name) == 0, run.logs()
    losses = {name: result(run, name)["loss_by_round"] for name in CLIENTS}
    rounds = run.ask("server", "/v1/rounds")
    assert len(losses["b"]) == len(losses["a"]) == len(rounds) == 6
    # On a busy machine a may be late at the very start.
    assert losses["a"].count(None) < losses["b"].count(None)
    for record, loss_a, loss_b in zip(rounds, losses["a"], losses["b"], strict=True):
        if loss_b is None and loss_a is not None:
            # It may have been in the first steps of the round before it was late.
            assert record["loss"] == pytest.approx(loss_a, rel=0.2)
        # A round waits for the deadline once per step at most.
        assert record["seconds"] < 10 * DEADLINE_SECONDS
    assert "went on without it" in run.log("b").read_text()
    # Whoever came late has the others' average at the end.
    assert len({result(run, name)["adapter_sha256"] for name in CLIENTS}) == 1
    assert "Traceback" not in run.logs()


def test_a_client_that_dies_is_not_waited_for_and_rejoins_when_it_comes_back(run: Run) -> None:
    run.start_all(
        a=("lesft.optimizer:Optimizer.step", "slow", 200),
        b=("lesft_client.link:ServerLink.send", "before", 4),
    )
    run.wait("b")
    run.wait_until("server", lambda body: body["rounds_done"] >= 4)
    run.start("b")
    for name in CLIENTS:
        assert run.wait(name) == 0, run.logs()
    assert None in result(run, "b")["loss_by_round"]
    assert len({result(run, name)["adapter_sha256"] for name in CLIENTS}) == 1
    assert "Traceback" not in run.logs()


def test_a_run_begins_with_a_quorum_and_a_client_can_join_in_its_midst(run: Run) -> None:
    for name in ("server", "aggregator"):
        run.start(name)
    run.start("a", ("lesft.optimizer:Optimizer.step", "slow", 300))
    run.wait_until("server", lambda body: body["rounds_done"] >= 2)
    run.start("b")
    for name in CLIENTS:
        assert run.wait(name) == 0, run.logs()
    assert "joined at round " in run.log("b").read_text()
    losses = result(run, "b")["loss_by_round"]
    assert losses[:2] == [None, None]
    assert len({result(run, name)["adapter_sha256"] for name in CLIENTS}) == 1


def test_a_server_that_dies_takes_everyone_back_or_lets_them_rejoin(run: Run) -> None:
    run.start_all(server=("lesft.back:Back.train_step", "before", 8), b=SLOW_CLIENT)
    run.wait("server")
    run.start("server")
    for name in CLIENTS:
        assert run.wait(name) == 0, run.logs()
    assert run.ask("server", "/v1/run")["steps_applied"] == 12
    assert len({result(run, name)["adapter_sha256"] for name in CLIENTS}) == 1
    assert "Traceback" not in run.logs()


def test_below_the_quorum_a_run_waits(zygote: Zygote, model: Path, tmp_path: Path) -> None:
    options = {"mode": "deadline", "quorum": 2, "deadline_seconds": 0.2}
    with new_run(zygote, tmp_path, model, **options) as run:
        run.start_all(b=("lesft_client.link:ServerLink.send", "before", 4))
        run.wait("b")
        run.wait_for_log("server", "the deadline has passed with 1 clients, 2 are needed")
        steps = run.ask("server", "/v1/run")["steps_applied"]
        time.sleep(1)
        assert run.ask("server", "/v1/run")["steps_applied"] == steps
        run.start("b")
        assert run.finish().steps == 12


def finish_without_b(run: Run) -> None:
    """The aggregator still waits for b's adapter, as another party: it has to be told too."""
    run.wait_until("server", lambda body: body["state"] == "finished")
    run.kill("aggregator")
    run.start("aggregator", None, "--clients=1")
    assert run.wait("a") == 0, run.logs()
    assert "Traceback" not in run.logs()


def test_clients_are_dropped_before_the_start_and_while_the_run_is_paused(
    zygote: Zygote, model: Path, tmp_path: Path
) -> None:
    with new_run(zygote, tmp_path, model, aggregation_interval=6) as run:
        url = f"http://{run._addresses['server control']}/v1"
        run.start("server")
        run.start("aggregator")
        run.start("b")
        run.wait_for_log("server", "b joined (1 of 2)")
        httpx.post(f"{url}/pause", trust_env=False)
        body = httpx.delete(f"{url}/clients/b", trust_env=False).json()
        assert (body["state"], body["clients_joined"]) == ("waiting for clients", 0)
        assert run.wait("b") == 3
        run.start("a")
        run.wait_until("server", lambda body: body["state"] == "training")
        time.sleep(0.5)  # its first micro-batches come, and wait for the pause to end
        httpx.post(f"{url}/resume", trust_env=False)
        finish_without_b(run)


def test_a_client_whose_part_waits_for_the_pause_to_end_can_be_dropped(
    zygote: Zygote, model: Path, tmp_path: Path
) -> None:
    with new_run(zygote, tmp_path, model, aggregation_interval=6) as run:
        url = f"http://{run._addresses['server control']}/v1"
        run.start("server")
        run.ask("server", "/v1/run")
        httpx.post(f"{url}/pause", trust_env=False)
        run.start("aggregator")
        run.start("a")
        run.wait_for_log("server", "a joined")
        run.start("b")
        run.wait_until("server", lambda body: body["state"] == "training")
        end = time.monotonic() + SECONDS
        while any(c["next_round"] < 1 for c in run.ask("server", "/v1/clients")):
            assert time.monotonic() < end, run.logs()
            time.sleep(0.02)
        httpx.delete(f"{url}/clients/b", trust_env=False)
        httpx.post(f"{url}/resume", trust_env=False)
        finish_without_b(run)


@pytest.mark.parametrize("mode", ["lockstep", "deadline"])
def test_a_client_that_is_dropped_is_no_longer_waited_for(
    mode: str, zygote: Zygote, model: Path, tmp_path: Path
) -> None:
    with new_run(zygote, tmp_path, model, mode=mode, aggregation_interval=6) as run:
        run.start_all(b=("lesft_client.link:ServerLink.send", "before", 4))
        run.wait("b")
        run.wait_until("server", lambda body: "'b'" in body["waiting_for"])
        url = f"http://{run._addresses['server control']}/v1/clients/b"
        assert httpx.delete(url, trust_env=False).json()["clients_joined"] == 1
        again = httpx.delete(url, trust_env=False)
        assert (again.status_code, again.json()["error"]) == (404, "NotFound")

        run.wait_until("server", lambda body: body["state"] == "finished")
        run.start("b")
        assert run.wait("b") == 3, run.logs()
        assert "client 'b' was dropped from the run by its operator" in run.log("b").read_text()
        # It is told so after a restart of the server too.
        run.kill("server")
        run.start("server")
        run.start("b")
        assert run.wait("b") == 3, run.logs()
        finish_without_b(run)
