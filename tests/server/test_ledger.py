"""The ledger: what it keeps and for how long, on a full disk and with damaged files."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from lesft.errors import OutOfOrder
from lesft.micro_batch import StepKey
from lesft.v1.training_pb2 import StepResult
from lesft_server import ledger as ledger_module
from lesft_server.ledger import Entry, Ledger

CLIENTS = ("a", "b")


def digest(client_id: str, key: StepKey) -> bytes:
    return f"{client_id} {key}".encode().ljust(32)[:32]


def entries(key: StepKey) -> list[Entry]:
    return [
        Entry(
            name,
            digest(name, key),
            StepResult(round=key.round, micro=key.micro, loss=key.round + index / 8),
            f"gradient of {name} at {key}".encode() * (index + 1),
        )
        for index, name in enumerate(CLIENTS)
    ]


def assert_has(ledger: Ledger, *keys: StepKey) -> None:
    for key in keys:
        for entry in entries(key):
            assert ledger.has(entry.client_id, key)
            assert ledger.find(entry.client_id, key, entry.digest)
            assert ledger.read(entry.client_id, key) == (entry.header, entry.bundle)


def windows_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def close_and_open(ledger: Ledger, round_index: int) -> None:
    ledger.close_window()
    ledger.open_window(round_index)


def test_answers_are_found_by_client_and_key_and_are_the_same_bytes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0)
    keys = [StepKey(0, 0), StepKey(0, 1), StepKey(1, 0)]
    for key in keys:
        assert not ledger.find("a", key, digest("a", key))
        ledger.append(entries(key))
        assert_has(ledger, key)
    assert_has(ledger, *keys)
    assert not ledger.has("c", keys[0])
    ledger.close()


def test_another_request_under_an_answered_key_is_a_fork(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0)
    key = StepKey(0, 1)
    ledger.append(entries(key))
    with pytest.raises(OutOfOrder, match=r"^client 'a' sent round 0 micro-batch 1 with other "):
        ledger.find("a", key, bytes(32))
    assert_has(ledger, key)
    ledger.close()


def test_the_open_window_and_the_one_before_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0)
    for start in (3, 6, 9):
        ledger.append(entries(StepKey(start - 1, 0)))
        close_and_open(ledger, start)
    assert windows_in(tmp_path) == ["round-000006.ledger", "round-000009.ledger"]
    assert ledger.first_round == 6
    assert_has(ledger, StepKey(8, 0))
    assert not ledger.has("a", StepKey(5, 0))
    ledger.close()


def test_closed_windows_outlive_the_process_and_the_open_one_does_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0)
    ledger.append(entries(StepKey(0, 0)))
    ledger.append(entries(StepKey(2, 1)))
    close_and_open(ledger, 3)
    ledger.append(entries(StepKey(3, 0)))  # of a server that dies now

    again = Ledger(tmp_path, 3)
    assert again.first_round == 0
    assert_has(again, StepKey(0, 0), StepKey(2, 1))
    assert not again.has("a", StepKey(3, 0))
    again.append(entries(StepKey(3, 0)))
    assert_has(again, StepKey(3, 0))
    again.close()

    # Its checkpoint of round 3 was damaged, so it goes back to the beginning.
    anew = Ledger(tmp_path, 0)
    assert (anew.first_round, windows_in(tmp_path)) == (0, ["round-000000.ledger"])
    assert not anew.has("a", StepKey(0, 0))
    anew.close()
    ledger.close()


def test_of_a_step_that_does_not_fit_on_the_disk_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path, 0)
    first, second = StepKey(0, 0), StepKey(0, 1)
    ledger.append(entries(first))
    size = os.path.getsize(tmp_path / "round-000000.ledger")
    write, written = ledger_module._write, 0

    def full(file: Any, data: bytes) -> None:
        nonlocal written
        written += 1
        if written == 4:
            write(file, data[:5])
            raise OSError(28, "No space left on device")
        write(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(ledger_module, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.append(entries(second))
    assert os.path.getsize(tmp_path / "round-000000.ledger") == size
    assert not ledger.has("a", second)
    ledger.append(entries(second))
    assert_has(ledger, first, second)
    ledger.close()


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_what_lies_behind_a_damaged_entry_is_lost_and_the_log_says_so(
    cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path, 0)
    ledger.append(entries(StepKey(0, 0)))
    ledger.append(entries(StepKey(0, 1)))
    close_and_open(ledger, 1)
    ledger.close()
    path = tmp_path / "round-000000.ledger"
    os.truncate(path, os.path.getsize(path) - cut)
    with caplog.at_level(logging.WARNING):
        again = Ledger(tmp_path, 1)
    assert f"{path} is damaged at byte " in caplog.text
    assert_has(again, StepKey(0, 0))
    assert again.has("a", StepKey(0, 1))
    assert not again.has("b", StepKey(0, 1))
    again.close()
