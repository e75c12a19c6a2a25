"""What a run comes back from as a whole, and what it refuses to come back from."""

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.recovery.harness import CLIENTS, Disturbance, Outcome, Run, Zygote, new_run

ALL = ("server", "aggregator", *CLIENTS)

IN_THE_THIRD_ROUND: Disturbance = ("lesft_client.link:ServerLink.send", "before", 7)
IN_THE_FIFTH_ROUND: Disturbance = ("lesft_client.link:ServerLink.send", "before", 11)


@pytest.mark.parametrize("disturbance", [IN_THE_THIRD_ROUND, IN_THE_FIFTH_ROUND])
def test_a_power_cut_of_everything_at_once(
    disturbance: Disturbance, zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start_all(a=disturbance)
        run.wait("a")
        for name in ("server", "aggregator", "b"):
            run.kill(name)
        run.start_all()
        assert run.finish() == undisturbed


def test_a_run_that_sends_and_holds_as_little_as_can_be_is_the_same_after_crashes(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    """The server answers what it has answered before from its ledger, as it was encoded, and
    remembers of samples what it did then; the clients round their fronts anew, to the same."""
    options = {
        "activation_encoding": "int8",
        "gradient_encoding": "int4",
        "adapter_encoding": "int4",
        "loss.reference_refresh": "once",
        "rounds": 8,
    }
    fronts = {"a": "--precision=int8", "b": "--precision=int4"}

    def start_all(run: Run, disturbance: Disturbance | None = None) -> None:
        for name in ("server", "aggregator"):
            run.start(name)
        run.start("a", disturbance, fronts["a"])
        run.start("b", None, fronts["b"])

    with new_run(zygote, tmp_path / "undisturbed", model, **options) as run:
        start_all(run)
        outcome = run.finish()
    with new_run(zygote, tmp_path / "disturbed", model, **options) as run:
        start_all(run, IN_THE_FIFTH_ROUND)
        run.wait("a")
        run.start("a", None, fronts["a"])
        run.kill("server")
        run.start("server")
        assert run.finish() == outcome
    assert outcome.adapters != undisturbed.adapters


def test_server_and_client_die_one_after_the_other_again_and_again(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start_all(a=IN_THE_THIRD_ROUND)
        run.wait("a")
        run.kill("server")
        run.start("server", ("lesft.back:Back.train_step", "after", 1))
        run.start("a")
        assert run.wait("server") == -9
        run.kill("a")
        run.start("server")
        run.start("a", ("lesft_client.link:ServerLink.receive", "before", 2))
        assert run.wait("a") == -9
        run.start("a")
        assert run.finish() == undisturbed


def test_a_client_that_lost_its_state_is_answered_from_the_beginning_while_the_ledger_reaches_it(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        # In the second window, so that one version of the adapters is published.
        run.start_all(a=IN_THE_THIRD_ROUND)
        run.wait("a")
        shutil.rmtree(tmp_path / "a")
        run.start("a")
        finished = run.finish()
    # It scores its held-out samples once more, with what the server has by then.
    assert replace(finished, held_out={}) == replace(undisturbed, held_out={})


def test_clients_wait_for_an_aggregator_that_is_told_to_stop(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start_all(a=("lesft_client.aggregation:Aggregator.submit", "before", 2))
        run.wait("a")
        run.wait_for_log("aggregator", "version 2: b submitted, 1 of 2")
        run.kill("aggregator", signal.SIGTERM)
        assert run.status("aggregator") == 0
        run.start("a")
        run.start("aggregator")
        assert run.finish() == undisturbed


def newest_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("round-*"))


@pytest.mark.parametrize("file", ["tensors.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("victim", ["server", "a"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    victim: str, file: str, zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start_all(a=IN_THE_FIFTH_ROUND)
        run.wait("a")
        if victim == "server":
            run.kill("server")
        path = newest_checkpoint(tmp_path / victim)
        assert path.name == "round-000004"
        data = bytearray((path / file).read_bytes())
        # A digit becomes another one: JSON stays JSON.
        digit = next(i for i in range(len(data) // 2, len(data)) if chr(data[i]) in "0123456789")
        data[digit] ^= 1
        (path / file).write_bytes(data)
        for name in {victim, "a"}:
            run.start(name)
        assert run.finish() == undisturbed
        log = run.log(victim).read_text()
        assert f"{path} is damaged and passed over: {file} does not match its checksum" in log
        came_back = (
            "going on from the checkpoint of round 2" if victim == "server" else "round 3 of"
        )
        assert came_back in log


def test_services_that_are_told_to_stop_go_on_when_they_are_started_again(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start_all(a=IN_THE_FIFTH_ROUND)
        run.wait("a")
        for name in ("server", "aggregator", "b"):
            run.kill(name, signal.SIGTERM)
        assert (run.status("server"), run.status("b")) == (0, 130)
        run.start_all()
        assert run.finish() == undisturbed


def test_a_finished_client_that_is_started_again_leaves_the_same_result(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start_all()
        assert run.finish() == undisturbed
        (tmp_path / "a" / "result.json").unlink()
        run.start("a")
        assert run.finish() == undisturbed
        run.kill("server")
        run.start("server")
        (tmp_path / "b" / "result.json").unlink()
        run.start("b")
        assert run.finish() == undisturbed


# ---------------------------------------------------------------------- clients that do not train

FROZEN = "--no-train-front"


def start_frozen(run: Run, **disturbance: Disturbance) -> None:
    for name in ALL:
        run.start(name, disturbance.get(name), *([FROZEN] if name == "server" else []))


def sent_activations(run: Run, name: str) -> int:
    """Bytes of the base path's that a client has counted."""
    result = json.loads((run.folder / name / "result.json").read_text())
    count: int = result["wire"]["up"]["activations_base"]
    return count


@pytest.fixture(scope="module")
def undisturbed_frozen(
    zygote: Zygote, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, dict[str, int]]:
    """And what each client has sent: every sample once, some are drawn twice."""
    with new_run(zygote, tmp_path_factory.mktemp("frozen"), model) as run:
        start_frozen(run)
        return run.finish(), {name: sent_activations(run, name) for name in CLIENTS}


def test_a_client_that_does_not_train_sends_nothing_again_after_a_crash(
    zygote: Zygote,
    model: Path,
    tmp_path: Path,
    undisturbed_frozen: tuple[Outcome, dict[str, int]],
) -> None:
    """What it had sent since its checkpoint the server holds, and the client forgot to count."""
    outcome, sent = undisturbed_frozen
    with new_run(zygote, tmp_path, model) as run:
        start_frozen(run, a=IN_THE_THIRD_ROUND)
        run.wait("a")
        run.start("a")
        assert run.finish() == outcome
        assert 0 < sent_activations(run, "a") < sent["a"]
        assert sent_activations(run, "b") == sent["b"]


def test_a_server_that_crashes_still_holds_the_samples_of_clients_that_do_not_train(
    zygote: Zygote,
    model: Path,
    tmp_path: Path,
    undisturbed_frozen: tuple[Outcome, dict[str, int]],
) -> None:
    """In the second epoch, when all samples have been sent."""
    outcome, sent = undisturbed_frozen
    with new_run(zygote, tmp_path, model) as run:
        start_frozen(run, server=("lesft.back:Back.train_step", "before", 11))
        assert run.wait("server") == -9
        run.start("server", None, FROZEN)
        assert run.finish() == outcome
        assert {name: sent_activations(run, name) for name in CLIENTS} == sent


# ---------------------------------------------------------------------- operators


def post(run: Run, path: str) -> dict[str, Any]:
    url = f"http://{run._addresses['server control']}{path}"
    body: dict[str, Any] = httpx.post(url, trust_env=False).raise_for_status().json()
    return body


def test_a_run_that_is_paused_stopped_and_started_again_is_the_same(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start("server", ("lesft.back:Back.train_step", "slow", 400))
        run.ask("server", "/v1/run")
        assert post(run, "/v1/pause")["paused"]
        for name in ("aggregator", *CLIENTS):
            run.start(name)
        run.wait_until("server", lambda body: body["state"] == "training")
        time.sleep(0.5)
        paused = run.ask("server", "/v1/run")
        assert paused["steps_applied"] == 0
        assert paused["waiting_for"] == "the server's operator, who has paused the run"
        assert not post(run, "/v1/resume")["paused"]

        # Asked in the third round, which ends without a checkpoint of its own.
        while any(client["next_round"] < 3 for client in run.ask("server", "/v1/clients")):
            time.sleep(0.02)
        post(run, "/v1/stop")
        assert [run.wait(name) for name in CLIENTS] == [3, 3]
        stopped = run.ask("server", "/v1/run")
        assert (stopped["state"], stopped["rounds_done"]) == ("stopped", 3)
        assert "its operator stopped it after round 3; start server and clients" in (
            run.log("a").read_text()
        )
        for name in ("server", *CLIENTS):
            assert newest_checkpoint(tmp_path / name).name == "round-000003"
        run.kill("server", signal.SIGTERM)
        for name in ("server", *CLIENTS):
            run.start(name)
        assert run.finish() == undisturbed


@pytest.mark.parametrize(
    ("victim", "call"),
    [
        ("server", "lesft.checkpoints:write_and_sync"),
        ("server", "lesft_server.ledger:_write"),
        ("a", "lesft.checkpoints:write_and_sync"),
    ],
)
def test_a_full_disk_pauses_the_run_until_there_is_room(
    victim: str, call: str, zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    full = tmp_path / "full"
    with new_run(zygote, tmp_path, model) as run:
        full.touch()
        run.start_all(**{victim: (call, "full", str(full))})
        message = f"no room on disk for {tmp_path / victim}: free some, training goes on by itself"
        run.wait_for_log(victim, message)
        before, described = -1, run.ask("server", "/v1/run")
        while described["steps_applied"] != before:  # the rest of a window that has begun
            before = described["steps_applied"]
            time.sleep(1)
            described = run.ask("server", "/v1/run")
        assert before < undisturbed.steps
        if victim == "server":
            assert described["waiting_for"] == message
        full.unlink()
        assert run.finish() == undisturbed
        assert f"there is room on disk for {tmp_path / victim} again" in run.log(victim).read_text()


def test_a_checkpoint_out_of_turn_is_what_everyone_goes_on_from(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        # The server is killed before the step of round 3, which is in the second window.
        run.start("server", ("lesft.back:Back.train_step", "before", 7))
        run.ask("server", "/v1/run")
        post(run, "/v1/pause")
        for name in ("aggregator", *CLIENTS):
            run.start(name)
        post(run, "/v1/checkpoint")
        post(run, "/v1/resume")
        assert run.wait("server") == -9
        rounds = {path.name for path in (tmp_path / "server" / "checkpoints").glob("round-*")}
        assert rounds == {"round-000001", "round-000002"}
        run.start("server")
        assert run.finish() == undisturbed


# ---------------------------------------------------------------------- refused


def test_states_that_do_not_fit_are_refused_by_name_and_fresh_starts_anew(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start_all()
        assert run.finish() == undisturbed
        state = tmp_path / "a"

        def refusal(name: str, *options: str) -> str:
            run.start(name, None, *options)
            assert run.wait(name) == 1, run.logs()
            return run.log(name).read_text().splitlines()[-1]

        assert refusal("a", "--share=2/2").endswith(
            f"--state {state}: the training samples are not those that the run began with: give "
            "the same --data, --data-seed, --samples, --share and --skew, or start anew with "
            "--fresh"
        )
        assert refusal("a", "--client-id=c").startswith("lesft-client: ")
        assert "is in use by another server" in run.log_of_second("server")

        # The server has lost its state: nothing fits to the clients' checkpoints.
        run.kill("server")
        shutil.rmtree(tmp_path / "server")
        run.start("server")
        run.ask("server", "/v1/run")
        assert refusal("a").endswith(
            "checkpoint_rounds: server 0 to 0, client 4,6; give the client, or the server, the "
            "--state that it had before, or start everybody anew with --fresh"
        )

        # Another run in the same folder.
        run.kill("server")
        checkpoints = tmp_path / "server" / "checkpoints"
        shutil.copytree(state / "checkpoints", checkpoints, dirs_exist_ok=True)
        other = refusal("server", "--seed=1")
        assert "belongs to a run with other settings: use another --state, or --fresh" in other
        run.kill("aggregator")
        shutil.rmtree(tmp_path / "aggregator")
        run.start("aggregator")
        for name in ("server", *CLIENTS):
            run.start(name, None, "--fresh")
        assert run.finish() == undisturbed


def test_a_result_says_how_often_its_client_had_to_connect_again(
    zygote: Zygote, model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start_all(server=("lesft.back:Back.train_step", "before", 7))
        run.wait("server")
        run.start("server")
        assert run.finish() == undisturbed
        for name in CLIENTS:
            assert json.loads((tmp_path / name / "result.json").read_text())["reconnects"] == 1
