"""The operator's commands and the device's, as they are typed, and what they say."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lesft.errors import InvalidInput, NotAuthenticated
from lesft.identity.ticket import ACCESS_PREFIX, read_ticket
from lesft_aggregator.main import main as aggregator_main
from lesft_client.connection_settings import ConnectionSettings
from lesft_client.connector import Connector
from lesft_client.enrol import enrol_where_needed, enrol_with
from lesft_client.identities import Identities
from lesft_client.main import main as client_main
from lesft_server.main import main as server_main
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


def test_each_service_has_its_own_variables(
    service: RunningAggregator, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LESFT_AGGREGATOR_STATE", str(service.state))
    for bare, value in {"STATE": "/elsewhere", "HOST": "elsewhere.example", "ROLE": "x"}.items():
        monkeypatch.setenv(bare, value)
    for argv in (["access"], ["enroll", "by-variable"], ["token", "by-variable"]):
        assert ended(aggregator_main, argv) == 0, argv
    token = read_ticket(capsys.readouterr().out.split()[-1], ACCESS_PREFIX, "it")
    assert token.control_address == service.control
    assert ended(aggregator_main, ["revoke", "by-variable"]) == 0
    assert ended(server_main, ["access"]) == 2  # that variable is not the server's
    assert "--state: Field required" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["enroll", "a"], ["revoke", "a"], ["token", "a"], ["access"]])
def test_another_services_folder_is_refused(
    service: RunningAggregator, tmp_path: Path, capsys: Capture, command: list[str]
) -> None:
    for folder in (service.state, tmp_path / "none"):
        assert ended(server_main, [*command, "--state", str(folder)]) == 1
        assert f"--state {folder} is of no server that was started" in capsys.readouterr().err
        assert ended(server_main, ["key", "--state", str(folder)]) == 1
        capsys.readouterr()
    assert not (tmp_path / "none").exists()


def test_devices_need_a_control_api_that_they_reach(tmp_path: Path, capsys: Capture) -> None:
    with secure_aggregator(tmp_path, listen="0.0.0.0:0", tls="auto"):
        assert ended(aggregator_main, ["enroll", "a", "--state", str(tmp_path)]) == 1
    assert "start it with --control 0.0.0.0:PORT" in capsys.readouterr().err


def test_a_token_whose_answer_got_lost_may_be_used_again_by_the_same_device(
    service: RunningAggregator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = service.invite("unlucky")

    def lose(self: Identities, *arguments: Any) -> Path:
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(Identities, "add", lose)
        with pytest.raises(OSError, match="the power went"):
            enrol_with(ticket, tmp_path)
    assert enrol_with(ticket, tmp_path).client_id == "unlucky"
    assert [file.name for file in tmp_path.glob("pending*")] == []
    with pytest.raises(NotAuthenticated, match="was used before"):
        enrol_with(ticket, tmp_path / "another device")


def test_tokens_in_files_enrol_once_and_again_when_they_are_new(
    service: RunningAggregator, tmp_path: Path
) -> None:
    file, folder = tmp_path / "token", tmp_path / "identity"

    def enrolled_with(text: str) -> bytes:
        file.write_text(text)
        enrol_where_needed([file], folder)
        return service.identity(folder).pair_file.read_bytes()

    first_token, second_token = (service.invite("by-itself").text() for _ in range(2))
    first = enrolled_with(first_token)
    assert enrolled_with(first_token) == first
    second = enrolled_with(second_token)
    assert second != first
    assert enrolled_with(first_token) == second  # used: what is there stays
    service.revoke("by-itself")
    assert enrolled_with(service.invite("by-itself").text()) != second


def test_a_token_of_one_service_does_not_take_anothers_place(
    service: RunningAggregator, tmp_path: Path
) -> None:
    folder = tmp_path / "identity"
    enrol_with(service.invite("a"), folder)
    before = service.identity(folder).pair_file.read_bytes()
    with secure_aggregator(tmp_path / "other") as other:
        lure = dataclasses.replace(other.invite("a"), address=service.grpc)
        with pytest.raises(InvalidInput, match="has enrolled with another aggregator at"):
            enrol_with(lure, folder)
        assert service.identity(folder).pair_file.read_bytes() == before
        enrol_with(lure, folder, replace=True)
        assert service.identity(folder).pair_file.read_bytes() != before
        for address in ("..", "", "nowhere"):
            with pytest.raises(InvalidInput, match="an address must be HOST:PORT"):
                enrol_with(dataclasses.replace(other.invite("a"), address=address), folder)
    with pytest.raises(InvalidInput, match="is an aggregator that this device has enrolled with"):
        Connector(service.grpc, ConnectionSettings(identity=folder), "server")


def test_enrolling_that_a_power_cut_ended_can_be_begun_again(
    service: RunningAggregator, tmp_path: Path
) -> None:
    ticket, folder = service.invite("cut-off"), tmp_path / "identity"
    enrol_with(ticket, folder)
    facts = service.identity(folder).pair_file.with_name("identity.json")
    facts.unlink()
    assert Identities(folder).find(service.grpc) is None
    assert enrol_with(service.invite("cut-off"), folder).client_id == "cut-off"


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
