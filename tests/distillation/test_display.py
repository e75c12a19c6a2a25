import asyncio
from types import SimpleNamespace

import pytest

from lesft_client import counted_progress
from lesft_client.distillation.display import Display


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still unless `seconds` is changed."""
    clock = SimpleNamespace(seconds=0.0)
    clock.monotonic = lambda: clock.seconds
    monkeypatch.setattr(counted_progress, "time", clock)
    return clock


def test_a_line_says_how_far_it_is_and_how_long_it_takes(
    time: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counted_progress, "LINE_SECONDS", 0.01)
    lines: list[str] = []

    async def until_a_line_is_said() -> None:
        said = asyncio.Event()

        def say(line: str) -> None:
            lines.append(line)
            said.set()

        monkeypatch.setattr(shown, "say", say)
        ticker = asyncio.create_task(shown.keep_ticking())
        await said.wait()
        ticker.cancel()

    shown = Display(total=10, done=4, kept=3, bar=False)
    for kept, requests in ((True, 2), (False, 6), (True, 7)):
        shown.finished(kept, requests)
    time.seconds = 30.0
    asyncio.run(until_a_line_is_said())
    assert lines[0] == "7/10 questions  5 kept  14 requests/min  30 s left"


def test_a_complaint_is_said_once_in_ten_seconds(
    time: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Display(total=1, done=0, kept=0, bar=False)
    for seconds in (0.0, 1.0, 9.9, 10.0):
        time.seconds = seconds
        shown.waiting(f"busy at {seconds}")
    assert capsys.readouterr().err == "busy at 0.0; trying again\nbusy at 10.0; trying again\n"


def test_a_bar_leaves_no_lines_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counted_progress, "LINE_SECONDS", 0.01)

    async def work() -> None:
        ticker = asyncio.create_task(shown.keep_ticking())
        await asyncio.sleep(0.05)
        shown.finished(kept=True, requests=1)
        ticker.cancel()

    with Display(total=2, done=0, kept=0, bar=True) as shown:
        asyncio.run(work())
    said = capsys.readouterr().err
    assert "1/2 1 kept" in said
    assert "questions" not in said
