"""The operator's commands and the device's, as they are typed, and what they say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lesft_aggregator.main import main as aggregator_main
from lesft_client.main import main as client_main
from tests.identity.harness import RunningAggregator, secure_aggregator

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAggregator]:
    with secure_aggregator(tmp_path_factory.mktemp("aggregator")) as running:
        yield running


def ended(main: Any, argv: list[str]) -> int:
    """The exit status of a command."""
    try:
        main(argv)
    except SystemExit as error:
        return int(str(error.code))
    return 0


def test_two_commands_enrol_a_device(
    service: RunningAggregator, tmp_path: Path, capsys: Capture
) -> None:
    state = ["--state", str(service.state)]
    assert ended(aggregator_main, ["enroll", "ward-3", *state]) == 0
    printed = capsys.readouterr()
    assert "for ward-3, once, within 24 h:  lesft-client enroll TOKEN" in printed.err
    token = printed.out.strip()
    identity = ["--identity", str(tmp_path / "identity")]
    assert ended(client_main, ["enroll", token, *identity]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"enrolled with the aggregator at {service.grpc} as 'ward-3'",
        f"use it:  lesft-client train --aggregator {service.grpc} ...",
    ]
    assert ended(client_main, ["enroll", token, *identity]) == 1
    assert "was used before" in capsys.readouterr().err
    assert ended(aggregator_main, ["access", *state]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["client", "ward-3", "enrolled"] for line in lines)
    for secret in (tmp_path / "identity").rglob("client.pem"):
        assert secret.stat().st_mode & 0o777 == 0o600


def test_a_token_may_come_from_a_file_or_a_pipe(
    service: RunningAggregator,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "token"
    argv = ["enroll", "by-file", "--state", str(service.state), "--output", str(file)]
    assert ended(aggregator_main, argv) == 0
    assert capsys.readouterr().out == ""
    assert file.stat().st_mode & 0o777 == 0o600
    assert ended(client_main, ["enroll", str(file), "--identity", str(tmp_path / "a")]) == 0
    again = service.invite("by-pipe").text()
    monkeypatch.setattr("sys.stdin.read", lambda: f"{again}\n", raising=False)
    assert ended(client_main, ["enroll", "-", "--identity", str(tmp_path / "b")]) == 0
    assert "as 'by-pipe'" in capsys.readouterr().err


def test_what_is_no_token_is_not_repeated(tmp_path: Path, capsys: Capture) -> None:
    assert ended(client_main, ["enroll", "hunter2", "--identity", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "begins with lesft-enrol-" in said
    assert "hunter2" not in said
    assert ended(client_main, ["enroll"]) == 2


def test_status_from_any_machine_with_a_token(
    service: RunningAggregator, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "me.token"
    state = ["--state", str(service.state)]
    assert ended(aggregator_main, ["token", "me", *state, "--output", str(file)]) == 0
    assert ended(aggregator_main, ["status", "--token", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "run        lesft, 0 of 2 clients known"
    assert ended(aggregator_main, ["status", "--token", str(file), "--output", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["run"]["version"], facts["obstacle"]) == (0, "")
    assert ended(aggregator_main, ["token", "me", *state, "--revoke"]) == 0
    assert ended(aggregator_main, ["status", "--token", str(file)]) == 1
    assert "not known here, was revoked or has expired" in capsys.readouterr().err


def test_status_tells_a_service_that_is_gone_from_one_that_waits(
    tmp_path: Path, capsys: Capture
) -> None:
    with secure_aggregator(tmp_path / "state") as gone:
        file = tmp_path / "me.token"
        file.write_text(gone.token("me", "viewer"))
        gone.aggregator.rounds.obstacle = "no room on disk"
        assert ended(aggregator_main, ["status", "--token", str(file)]) == 4
        assert "cannot go on: no room on disk" in capsys.readouterr().out
    assert ended(aggregator_main, ["status", "--token", str(file)]) == 1
    assert "is it running and is the address right?" in capsys.readouterr().err


def test_commands_on_a_service_that_does_not_encrypt_say_what_to_do(
    tmp_path: Path, capsys: Capture
) -> None:
    with secure_aggregator(tmp_path, tls="auto"):
        assert ended(aggregator_main, ["enroll", "a", "--state", str(tmp_path)]) == 1
    assert "start it with --listen beyond this machine, or with --tls on" in capsys.readouterr().err
    assert ended(aggregator_main, ["enroll", "a", "--state", str(tmp_path / "none")]) == 1
    assert "is of no aggregator that was started" in capsys.readouterr().err


def test_a_service_on_every_address_has_to_be_told_its_name(
    tmp_path: Path, capsys: Capture
) -> None:
    with secure_aggregator(tmp_path, listen="0.0.0.0:0", control="0.0.0.0:0", tls="auto"):
        state = ["--state", str(tmp_path)]
        assert ended(aggregator_main, ["enroll", "a", *state]) == 1
        assert "say by which name or address others reach it" in capsys.readouterr().err
        argv = ["enroll", "a", *state, "--host", "127.0.0.1"]
        assert ended(aggregator_main, argv) == 0
        token = capsys.readouterr().out.strip()
        identity = tmp_path / "identity"
        assert ended(client_main, ["enroll", token, "--identity", str(identity)]) == 0


@pytest.mark.parametrize("argv", [["enroll", "a b"], ["enroll", "a", "--hours", "0"], ["enrol"]])
def test_mistakes_are_named(argv: list[str], capsys: Capture) -> None:
    assert ended(aggregator_main, [*argv, "--state", "x"]) == 2
    assert "lesft-aggregator" in capsys.readouterr().err
