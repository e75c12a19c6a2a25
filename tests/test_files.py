"""Files that are whole or not there."""

import errno
from pathlib import Path

import pytest

from lesft import files
from lesft.files import write_atomically


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
