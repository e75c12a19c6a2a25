"""Files that are whole or not there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lesft import files
from lesft.errors import InvalidInput
from lesft.files import lock_folder, when_there_is_room, write_atomically


def test_a_file_is_written_into_a_folder_that_may_be_new_and_replaces_an_old_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a/b/file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_forced_to_disk_in_the_right_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    path = tmp_path / "file"
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: events.append("there" if path.exists() else "not yet")
    )
    write_atomically(path, b"data")
    # The data before its name appears, the folder with the name after.
    assert events == ["not yet", "there"]


# ---------------------------------------------------------------------- one process per folder


def test_a_folder_is_held_until_its_holder_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "new/state"
    handle = lock_folder(folder, "client")
    with pytest.raises(InvalidInput) as caught:
        lock_folder(folder, "client")
    assert str(caught.value) == (
        f"--state {folder} is in use by another client: stop that one, or use another folder"
    )
    os.close(handle)
    os.close(lock_folder(folder, "client"))


# ---------------------------------------------------------------------- a full disk


def failing(times: int, code: int) -> Callable[[], str]:
    """A write that fails so many times before it succeeds."""
    left = times

    def write() -> str:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(code, os.strerror(code))
        return "written"

    return write


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; time passes only in them."""
    made: list[float] = []

    class Clock:
        sleep = made.append

        @staticmethod
        def monotonic() -> float:
            return 1000.0 + sum(made)

    monkeypatch.setattr(files, "time", Clock)
    return made


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_write_is_repeated_until_there_is_room_and_the_log_says_so_now_and_then(
    tmp_path: Path, pauses: list[float], code: int, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    assert when_there_is_room(failing(65, code), tmp_path, heard.append) == "written"
    reason = f"no room on disk for {tmp_path}: free some, training goes on by itself"
    assert heard == [*65 * [reason], ""]
    assert pauses == 65 * [2.0]
    # Two minutes and more: said when it began, once a minute, and when it was over.
    assert caplog.messages == [
        *3 * [f"{reason} ({os.strerror(code)})"],
        f"there is room on disk for {tmp_path} again",
    ]


def test_with_room_nothing_is_said(
    tmp_path: Path, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    assert when_there_is_room(failing(0, 0), tmp_path, heard.append) == "written"
    assert (heard, pauses, caplog.messages) == ([], [], [])


def test_any_other_error_is_raised_at_once(tmp_path: Path, pauses: list[float]) -> None:
    with pytest.raises(PermissionError):
        when_there_is_room(failing(1, errno.EACCES), tmp_path)
    assert pauses == []


def test_the_full_disks_error_is_raised_once_nobody_wants_to_go_on(
    tmp_path: Path, pauses: list[float]
) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        when_there_is_room(failing(1000, errno.ENOSPC), tmp_path, go_on=lambda: len(pauses) < 3)
    assert len(pauses) == 3
