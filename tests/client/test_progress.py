"""What the client shows: lines where there is no terminal, a bar where there is one."""

from types import SimpleNamespace

import pytest

from lesft.wire import WireCounter
from lesft_client import progress
from lesft_client.progress import ProgressDisplay
from lesft_client.status import Status


@pytest.fixture
def status() -> Status:
    """Half-way through four rounds, after a minute."""
    status = Status("client-0", WireCounter(), rounds=4, tokens=600)
    status.seconds_before = 60.0
    status.loss_by_round = [2.5, 1.25]
    status.wire.add("up", "activations_base", 2_500_000)
    status.wire.add("down", "gradients", 1_000)
    return status


def train(display: ProgressDisplay) -> None:
    """Show two phases as a run has them."""
    with display.phase("getting the front (88 MB)", 88):
        display.advance(40)
        display.advance(88)
    with display.phase("training", 4):
        display.round_done()
        display.say("[said] at 100%")
    display.say("finished")


def test_without_a_terminal_every_phase_and_round_is_a_line(
    status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    train(ProgressDisplay(status, bar=False))
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.rstrip() for line in err.splitlines()] == [
        "getting the front (88 MB) ...",
        "training ...",
        "round 2/4  loss 1.2500  10 tokens/s  up 2.5 MB  down 1.0 kB  60 s left",
        "[said] at 100%",
        "finished",
    ]
    assert status.phase == "training"


def test_a_bar_shows_the_same_figures(
    status: Status, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    train(ProgressDisplay(status, bar=True))
    _, err = capsys.readouterr()
    assert "getting the front (88 MB)" in err
    assert "88/88" in err
    assert "2/4 loss 1.2500  10 tokens/s  up 2.5 MB  down 1.0 kB" in err
    assert "[said] at 100%" in err
    assert "finished" in err


def test_a_wait_is_said_once_and_only_when_it_lasts(
    status: Status, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace()
    monkeypatch.setattr(progress, "time", clock)
    display = ProgressDisplay(status, bar=False)
    said = {}
    waits = {100: "b", 109: "b", 110: "", 111: "b", 116: "b", 122: "b", 140: "b", 141: "c"}
    for now, waiting_for in {**waits, 150: "c", 152: "c"}.items():
        clock.monotonic = lambda now=now: now
        display.waiting(waiting_for)
        assert status.waiting_for == waiting_for
        said[now] = capsys.readouterr().err
    assert {now: line for now, line in said.items() if line} == {
        122: "waiting for b\n",
        152: "waiting for c\n",
    }
