"""The digest by which a run is bound to its data."""

import hashlib
from pathlib import Path

import pytest

from lesft_testbed.data_digest import data_sha256


def test_a_file_has_its_own_sha256(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_bytes(b"{}\n")
    assert data_sha256(str(path)) == hashlib.sha256(b"{}\n").hexdigest()


def test_a_folder_s_digest_is_over_its_jsonl_files_and_which_line_is_in_which(
    tmp_path: Path,
) -> None:
    (tmp_path / "test.jsonl").write_text("1\n2\n")
    (tmp_path / "train.jsonl").write_text("3\n")
    first = data_sha256(str(tmp_path))
    (tmp_path / "README.md").write_text("no data")
    assert data_sha256(str(tmp_path)) == first
    (tmp_path / "test.jsonl").write_text("1\n")
    (tmp_path / "train.jsonl").write_text("2\n3\n")
    assert data_sha256(str(tmp_path)) != first


def test_a_name_goes_before_a_file_and_has_none_and_neither_has_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gsm8k").write_text("3\n")
    assert data_sha256("gsm8k") == ""
    assert len(data_sha256("./gsm8k")) == 64
    assert data_sha256("notes.jsonl") == ""
