"""The command line of lesft-aggregator."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lesft.settings import load_settings
from lesft_aggregator.settings import AggregatorSettings


def load(*argv: str) -> AggregatorSettings:
    return load_settings(AggregatorSettings, "lesft-aggregator", list(argv))


def test_a_quorum_of_zero_means_all_clients() -> None:
    assert load("--state", "s", "--clients", "5").required == 5
    quorum = ("--quorum", "3", "--deadline-seconds", "60")
    assert load("--state", "s", "--clients", "5", *quorum).required == 3


def test_every_option_is_an_environment_variable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LESFT_AGGREGATOR_CLIENTS", "7")
    monkeypatch.setenv("LESFT_AGGREGATOR_STATE", "/srv/state")
    settings = load()
    assert (settings.clients, settings.state) == (7, Path("/srv/state"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--state", "s"], "--clients: Field required"),
        (["--state", "s", "--clients", "0"], "--clients: Input should be greater than or equal"),
        (["--clients", "2"], "--state: Field required"),
        (
            ["--state", "s", "--clients", "2", "--quorum", "3"],
            "--quorum must be at most --clients (2), got 3",
        ),
        (
            ["--state", "s", "--clients", "3", "--quorum", "2"],
            "--quorum 2 only counts after a deadline: set --deadline-seconds",
        ),
        (["--state", "s", "--clients", "2", "--run-id", "a/b"], "--run-id: String should match"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(*argv)
    assert caught.value.code == 2
    assert f"lesft-aggregator: {message}" in capsys.readouterr().err


def test_help_answers_in_under_a_second_and_names_every_option() -> None:
    command = [sys.executable, "-c", "from lesft_aggregator.main import main; main(['--help'])"]
    start = time.monotonic()
    help_text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.monotonic() - start
    for name in AggregatorSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in help_text
    assert seconds < 1
