"""`lesft-testbed chaos`: the plan, the comparison, its figures, and a small one for real."""

import json
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from lesft.errors import InternalError, InvalidInput
from lesft.settings import load_settings
from lesft_aggregator.settings import AggregatorSettings
from lesft_testbed import chaos
from lesft_testbed.chaos import check_report
from lesft_testbed.chaos_plan import Fault, make_plan
from lesft_testbed.chaos_result import (
    ChaosReport,
    InjectedFault,
    Outcome,
    chaos_table,
    make_chaos_report,
)
from lesft_testbed.chaos_run import free_addresses, goal_steps
from lesft_testbed.commands import aggregator_command
from lesft_testbed.main import main
from lesft_testbed.processes import Processes
from lesft_testbed.settings import ChaosSettings, RunSettings
from tests.processes.harness import Process

CLIENTS = ["client-0", "client-1", "client-2", "client-3"]
SERVICES = {"server", "aggregator", *CLIENTS}
LINKS = {f"{client} -> {to}" for client in CLIENTS for to in ("server", "aggregator")}

# ---------------------------------------------------------------------- the plan


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    assert make_plan(ChaosSettings(seed=4)) == make_plan(ChaosSettings(seed=4))
    assert make_plan(ChaosSettings(seed=4)) != make_plan(ChaosSettings(seed=5))


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_leaves_out_no_service_no_link_and_no_kind_of_fault(seed: int) -> None:
    plan = make_plan(ChaosSettings(seed=seed))
    killed = Counter(fault.target for fault in plan if fault.kind == "kill")
    broken = Counter(fault.target for fault in plan if fault.kind != "kill")
    assert set(killed) == SERVICES
    assert (killed["server"], killed["aggregator"], killed.total()) == (5, 5, 20)
    assert set(broken) == LINKS
    assert broken.total() == 20
    kinds = Counter(fault.kind for fault in plan)
    assert kinds == {"kill": 20, "cut": 7, "half_open": 7, "delay": 6}


@pytest.mark.parametrize("seed", range(20))
def test_faults_come_in_order_and_while_there_is_training_to_disturb(seed: int) -> None:
    settings = ChaosSettings(seed=seed, rounds=30)
    plan = make_plan(settings)
    moments = [fault.at_round + fault.into_round for fault in plan]
    assert moments == sorted(moments)
    assert len(set(moments)) == 40
    assert all(1 <= moment < 28 for moment in moments)
    at_the_aggregator = [fault for fault in plan if fault.concerns_aggregator]
    assert len(at_the_aggregator) >= 5
    assert all(fault.at_round % 3 == 0 for fault in at_the_aggregator)
    elsewhere = [fault.at_round % 3 for fault in plan if not fault.concerns_aggregator]
    assert {0, 1, 2} == set(elsewhere)
    assert all(0 <= fault.seconds <= 1 for fault in plan if fault.kind in ("kill", "cut"))
    assert all(fault.held_seconds >= 0.1 for fault in plan if fault.kind == "delay")


def test_two_kills_are_one_of_the_server_and_one_of_a_client() -> None:
    plan = make_plan(ChaosSettings(kills=2, cuts=0, rounds=6))
    assert {fault.target.partition("-")[0] for fault in plan} == {"server", "client"}


def test_an_interval_longer_than_the_run_leaves_the_aggregator_any_round() -> None:
    plan = make_plan(ChaosSettings(aggregation_interval=1000))
    rounds = {fault.at_round for fault in plan if fault.concerns_aggregator}
    assert len(rounds) > 3


# ---------------------------------------------------------------------- following the run

SETTINGS = ChaosSettings(rounds=12, accumulation=3, aggregation_interval=4)


@pytest.mark.parametrize(
    ("target", "rounds_done", "expected"),
    [
        ("server", 0, 4),  # the first step of round 1
        ("client-0 -> server", 5, 19),
        ("client-0 -> aggregator", 5, 25),  # round 8 begins after an aggregation
        ("aggregator", 7, 25),
        ("aggregator", 4, 25),  # the aggregation after round 3 may be over already
        ("server", 11, 36),  # the end of the run
    ],
)
def test_a_fault_is_got_over_with_the_first_step_that_could_not_have_been_without(
    target: str, rounds_done: int, expected: int
) -> None:
    assert goal_steps(fault("kill", target), rounds_done, SETTINGS) == expected


def test_free_addresses_differ_and_are_out_of_reach_of_outgoing_connections() -> None:
    addresses = free_addresses(20)
    assert len(set(addresses)) == 20
    assert all(20_000 <= int(address.removeprefix("127.0.0.1:")) < 32_000 for address in addresses)


# ---------------------------------------------------------------------- killed and started again


def test_a_killed_service_is_forgotten_and_its_log_goes_on_in_its_next_life(tmp_path: Path) -> None:
    script = "import sys, time; print(sys.argv[1], flush=True); time.sleep(60)"
    with Processes(tmp_path) as processes:
        first = processes.start("server", [sys.executable, "-c", script, "one"])
        while first.log_tail(1) != "one":
            assert first.exit_status is None
        processes.kill("server")
        assert not psutil.pid_exists(first.pid)
        assert first.end() == "was ended by signal SIGKILL"
        assert processes.all == {}
        processes.check()
        second = processes.start("server", [sys.executable, "-c", script, "two"], append=True)
        while second.log_tail(1) != "two":
            assert second.exit_status is None
        printed = [line for line in second.log.read_text().splitlines() if line[0] != "$"]
        assert printed == ["one", "two"]


def test_more_options_go_before_the_testbeds_own() -> None:
    more = {"listen": "127.0.0.1:20001", "deadline_seconds": 7}
    _, *argv = aggregator_command(RunSettings(), Path("state"), more)
    aggregator = load_settings(AggregatorSettings, "lesft-aggregator", argv)
    assert (aggregator.listen, aggregator.control) == ("127.0.0.1:20001", "127.0.0.1:0")
    assert (aggregator.deadline_seconds, aggregator.clients) == (7, 4)


# ---------------------------------------------------------------------- the comparison


def fault(kind: Any, target: str) -> Fault:
    return Fault(at_round=2, into_round=0.5, kind=kind, target=target, seconds=0.5)


def outcome(**changes: Any) -> Outcome:
    """What an undisturbed run of two clients left."""
    whole = Outcome(
        adapters={"server": "5e" * 32, "client-0": "c1" * 32, "client-1": "c1" * 32},
        versions=["a1" * 32, "a2" * 32],
        losses={"client-0": [2.0, 1.5], "client-1": [3.0, 2.5]},
        round_seconds=[0.2, 0.1, 0.4],
        seconds=9.0,
        steps_applied=36,
        lineage="11" * 32,
    )
    return replace(whole, **changes)


OTHER = "0f" * 32
DIFFERENT_ADAPTERS: list[tuple[dict[str, Any], str]] = [
    (
        {"adapters": {"server": OTHER, "client-0": "c1" * 32, "client-1": "c1" * 32}},
        "server's adapter differs: chaos 0f0f0f0f0f0f, undisturbed 5e5e5e5e5e5e",
    ),
    (
        {"adapters": {"server": "5e" * 32, "client-0": "c1" * 32, "client-1": OTHER}},
        "the clients of the chaos run hold different adapters: "
        "client-0 c1c1c1c1c1c1, client-1 0f0f0f0f0f0f",
    ),
    (
        {"adapters": {"server": "5e" * 32, "client-0": OTHER, "client-1": OTHER}},
        "client-0's adapter differs: chaos 0f0f0f0f0f0f, undisturbed c1c1c1c1c1c1",
    ),
    (
        {"versions": ["a1" * 32, OTHER]},
        "version 2 of the aggregator differs: chaos 0f0f0f0f0f0f, undisturbed a2a2a2a2a2a2",
    ),
    (
        {"versions": ["a1" * 32]},
        "the aggregator published 1 versions, undisturbed 2",
    ),
]
DIFFERENT_STEPS: list[tuple[dict[str, Any], str]] = [
    (
        {"losses": {"client-0": [2.0, 1.5], "client-1": [3.0, 2.5000000000000004]}},
        "client-1's loss differs from round 2 on: 2.5000000000000004, undisturbed 2.5",
    ),
    (
        {"losses": {"client-0": [2.0], "client-1": [3.0, 2.5]}},
        "client-0 recorded 1 losses, undisturbed 2",
    ),
    ({"steps_applied": 37}, "the chaos run's model has gone through 37 steps, not 36"),
    ({"lineage": OTHER}, "the lineage differs: chaos 0f0f0f0f0f0f, undisturbed 111111111111"),
]


@pytest.mark.parametrize(
    ("changes", "message", "identical"),
    [(*case, False) for case in DIFFERENT_ADAPTERS] + [(*case, True) for case in DIFFERENT_STEPS],
)
def test_whatever_differs_is_named_and_is_an_error(
    changes: dict[str, Any], message: str, identical: bool
) -> None:
    report = make_chaos_report(SETTINGS, outcome(**changes), outcome())
    assert message in report.differences
    assert report.adapters_identical is identical
    with pytest.raises(InternalError) as caught:
        check_report(report, Path("out"))
    assert f"\n  {message}" in str(caught.value)
    assert "out/chaos.json" in str(caught.value)


def test_two_runs_that_are_the_same_pass() -> None:
    report = make_chaos_report(SETTINGS, outcome(), outcome())
    assert (report.differences, report.adapters_identical) == ([], True)
    check_report(report, Path("out"))


def test_a_run_too_short_for_its_faults_is_no_success() -> None:
    report = make_chaos_report(SETTINGS, outcome(faults_left=3), outcome())
    with pytest.raises(InvalidInput, match=r"ended before 3 of its faults could come.*than 12"):
        check_report(report, Path("out"))


# ---------------------------------------------------------------------- its figures

FAULTS = [
    InjectedFault(fault("kill", "client-1"), at_round=2, seconds=1.0, recovery_seconds=4.0),
    InjectedFault(fault("cut", "client-0 -> server"), 2, 1.5, recovery_seconds=0.5),
    InjectedFault(fault("kill", "client-0"), 3, 2.0, recovery_seconds=6.0),
    InjectedFault(fault("kill", "client-1"), 4, 3.0, recovery_seconds=11.0, alone=False),
    InjectedFault(fault("kill", "server"), 5, 4.0, recovery_seconds=7.0, alone=False),
]


def test_recovery_is_told_by_kind_and_kills_by_service() -> None:
    report = make_chaos_report(SETTINGS, outcome(faults=FAULTS, seconds=60.0), outcome())
    assert (report.kills, report.cuts) == (4, 1)
    assert report.kills_by_service == {"client-0": 1, "client-1": 2, "server": 1}
    recovery = {kind: list(vars(each).values()) for kind, each in report.recovery_seconds.items()}
    assert recovery == {
        "cut": [1, 0.5, 0.5, 0.5, 1, 0.5],
        "kill client": [3, 4.0, 6.0, 11.0, 2, 5.0],
        "kill server": [1, 7.0, 7.0, 7.0, 0, None],
    }
    assert report.round_seconds == 0.2
    assert report.seconds == {"chaos": 60.0, "undisturbed": 9.0}
    first = report.faults[0]
    assert (first.kind, first.target, first.description) == ("kill", "client-1", "killed client-1")
    assert (first.at_round, first.seconds, first.recovery_seconds) == (2, 1.0, 4.0)
    table = chaos_table(report)
    assert "4 kills (client-0 1, client-1 2, server 1), 1 faults of links" in table
    lines = table.splitlines()
    assert "seconds to recover     count     min  median     max   alone  median" in lines
    assert "kill client                3     4.0     6.0    11.0       2     5.0" in lines
    assert "kill server                1     7.0     7.0     7.0       0" in lines
    assert "adapters of both runs: identical, bit for bit" in table


@pytest.mark.parametrize(("applied", "repeated", "lost"), [(36, 0, 0), (38, 2, 0), (35, 0, 1)])
def test_steps_too_many_were_repeated_and_steps_too_few_lost(
    applied: int, repeated: int, lost: int
) -> None:
    report = make_chaos_report(SETTINGS, outcome(steps_applied=applied), outcome())
    assert (report.steps, report.steps_repeated, report.steps_lost) == (36, repeated, lost)


# ---------------------------------------------------------------------- the command


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Outcome]:
    """Runs leave what the test puts here, by the name of their folder."""
    outcomes = {"undisturbed": outcome(), "chaos": outcome(faults=FAULTS)}

    class FakeRun:
        def __init__(self, settings: ChaosSettings, folder: Path, *_: Any) -> None:
            folder.mkdir()
            self.run = lambda: outcomes[folder.name]

    monkeypatch.setattr(chaos, "ChaosRun", FakeRun)
    monkeypatch.setattr(chaos, "save_tiny_model", lambda folder, seed: folder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return outcomes


ARGUMENTS = ["chaos", "--rounds=12", "--kills=3", "--cuts=1"]


def test_the_command_ends_well_when_all_is_the_same(
    faked: dict[str, Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    main([*ARGUMENTS, f"--output={output}", "--seed=8"])
    report = ChaosReport.model_validate_json((output / "chaos.json").read_text())
    assert (report.seed, report.rounds, report.adapters_identical) == (8, 12, True)
    printed = capsys.readouterr()
    assert "identical, bit for bit" in printed.out
    assert "12 rounds with 3 kills and 1 faults of links" in printed.err
    main([*ARGUMENTS, f"--output={output}", "--seed=9", "--progress=none"])  # replaces the first
    assert json.loads((output / "chaos.json").read_text())["seed"] == 9
    assert capsys.readouterr().err == ""


def test_the_command_fails_and_leaves_its_figures_when_an_adapter_differs(
    faked: dict[str, Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faked["chaos"].adapters["server"] = OTHER
    with pytest.raises(SystemExit) as ended:
        main([*ARGUMENTS, f"--output={tmp_path / 'out'}"])
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert "adapters of both runs: DIFFERENT" in printed
    assert "server's adapter differs: chaos 0f0f0f0f0f0f" in printed
    report = json.loads((tmp_path / "out" / "chaos.json").read_text())
    assert report["adapters_identical"] is False
    assert len(report["faults"]) == len(FAULTS)


def test_a_folder_with_other_files_is_left_alone(
    faked: dict[str, Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit) as ended:
        main([*ARGUMENTS, f"--output={tmp_path}"])
    assert ended.value.code == 1
    assert "holds 'thesis.tex', which no run of the testbed has written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---------------------------------------------------------------------- for real


@pytest.mark.timeout(400)
def test_a_run_with_kills_and_cuts_comes_out_as_the_undisturbed_one(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = Process(
        *("lesft-testbed", "chaos", "--kills=2", "--cuts=2", "--rounds=6", "--clients=2"),
        f"--output={output}",
        cwd=tmp_path,
    )
    try:
        assert process.wait(380) == 0, process.output
    finally:
        # Its services are in sessions of their own: asked to stop, it ends them too.
        process.signal(signal.SIGTERM)
        process.wait(30)
        process.end()
    report = ChaosReport.model_validate_json((output / "chaos.json").read_text())
    assert (report.kills, report.cuts, report.faults_left) == (2, 2, 0)
    assert report.adapters_identical
    assert report.differences == []
    assert (report.steps, report.steps_repeated, report.steps_lost) == (18, 0, 0)
    assert all(each.recovery_seconds > 0 for each in report.faults)
    assert report.recovery_seconds["kill server"].count == 1
    assert report.recovery_seconds["kill client"].count == 1
    assert len([line for line in process.lines if "; training went on after " in line]) == 4
    for log in output.glob("*/*.log"):
        assert "Traceback" not in log.read_text(), log
    adapters = {path.read_bytes() for path in output.glob("*/state/client-*/adapter.safetensors")}
    assert len(adapters) == 1
