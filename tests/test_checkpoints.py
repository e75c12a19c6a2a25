"""Checkpoints: whole or not there, whatever happens while one is written or afterwards."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lesft.checkpoints import FACTS_FILE, TENSORS_FILE, Checkpoint, CheckpointStore
from lesft.errors import InvalidInput

KILLS = int(os.environ.get("LESFT_TEST_KILLS", "200"))
"""How often a saving process is killed; 1000 take a minute."""


def make_checkpoint(round_index: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(round_index)
    tensors = {
        "lora.a": torch.randn(3, 4, generator=generator),
        "exp_avg.a": torch.randn(3, 4, generator=generator).bfloat16(),
        "optimizer.steps": torch.tensor([round_index]),
    }
    return Checkpoint(round_index, tensors, {"loss": [0.1, 1e-300], "name": "ü", "none": None})


def make_store(folder: Path, *rounds: int) -> CheckpointStore:
    store = CheckpointStore(folder, "run")
    for index in rounds:
        store.save(make_checkpoint(index))
    return store


def assert_holds(store: CheckpointStore, *rounds: int) -> None:
    """The store has these rounds, each as it was saved."""
    assert store.rounds() == list(rounds)
    for index in rounds:
        loaded, saved = store.load(index), make_checkpoint(index)
        assert (loaded.round, loaded.facts) == (index, saved.facts)
        assert loaded.tensors.keys() == saved.tensors.keys()
        for name, tensor in saved.tensors.items():
            assert loaded.tensors[name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[name], tensor)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded_bit_for_bit_also_by_the_next_process(tmp_path: Path) -> None:
    store = make_store(tmp_path / "new/folder", 0, 7)
    assert_holds(store, 0, 7)
    assert_holds(make_store(tmp_path / "new/folder"), 0, 7)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0, 5, 10, 1_000_000)
    assert_holds(store, 10, 1_000_000)
    assert names_in(tmp_path) == ["round-000010", "round-1000000"]


@pytest.mark.parametrize(
    ("saved", "left"), [(4, [3, 4]), (5, [3, 5]), (1, [1]), (6, [5, 6])], ids=str
)
def test_saving_a_round_drops_those_of_later_rounds(
    tmp_path: Path, saved: int, left: list[int]
) -> None:
    """They belong to a course that was given up. The same round again replaces the first."""
    store = make_store(tmp_path, 3, 5)
    again = Checkpoint(saved, {"lora.a": torch.full((2,), 9.0)}, {"again": True})
    store.save(again)
    for opened in (store, make_store(tmp_path)):
        assert opened.rounds() == left
        assert opened.load(saved).facts == {"again": True}
        assert torch.equal(opened.load(saved).tensors["lora.a"], torch.full((2,), 9.0))


# ---------------------------------------------------------------------- damage

Damage = Callable[[Path], object]
DAMAGES: dict[str, Damage] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "an older one": lambda path: path.write_bytes(
        (path.parent.parent / "round-000001" / path.name).read_bytes()
    ),
}


@pytest.mark.parametrize("file", [TENSORS_FILE, FACTS_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_and_named_and_the_one_before_is_used(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_store(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "round-000002" / file)
    store = make_store(tmp_path)
    assert_holds(store, 1)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'round-000002'} is damaged and passed over: ")
    store.save(make_checkpoint(3))
    assert_holds(make_store(tmp_path), 1, 3)
    assert names_in(tmp_path) == ["round-000001", "round-000003"]


@pytest.mark.parametrize("file", [TENSORS_FILE, FACTS_FILE])
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, file: str) -> None:
    make_store(tmp_path, 1)
    path = tmp_path / "round-000001" / file
    data = path.read_bytes()
    for index in range(len(data)):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        assert make_store(tmp_path).rounds() == [], index
    path.write_bytes(data)
    assert_holds(make_store(tmp_path), 1)


def test_one_that_is_damaged_after_it_was_checked_is_refused_by_name(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1)
    DAMAGES["truncated"](tmp_path / "round-000001" / TENSORS_FILE)
    with pytest.raises(InvalidInput, match="round-000001 has been damaged since it was checked"):
        store.load(1)


def test_those_of_another_run_are_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    make_store(tmp_path, 1)
    with pytest.raises(InvalidInput) as caught:
        CheckpointStore(tmp_path, "another run")
    assert str(caught.value) == (
        f"{tmp_path / 'round-000001'} belongs to a run with other settings: use another --state, "
        "or --fresh to drop it and start anew"
    )
    assert_holds(make_store(tmp_path), 1)


def test_what_a_crash_left_half_written_vanishes(tmp_path: Path) -> None:
    make_store(tmp_path, 1)
    half = tmp_path / ".round-000002.tmp"
    half.mkdir()
    (half / TENSORS_FILE).write_bytes(b"half")
    assert_holds(make_store(tmp_path), 1)
    assert names_in(tmp_path) == ["round-000001"]


# ---------------------------------------------------------------------- a write that fails


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("again", [False, True], ids=["a new round", "the same round again"])
@pytest.mark.parametrize("failing", range(4))
def test_a_full_disk_leaves_the_earlier_ones_and_no_half(
    tmp_path: Path, failing: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room ends when the tensors, the facts or their folder are forced to disk, or at once."""
    store = make_store(tmp_path, 1, 2)
    synced, fsync = [], os.fsync

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > failing:
            no_room()
        fsync(descriptor)

    with monkeypatch.context() as patch:
        if failing == 3:
            patch.setattr(Path, "open", no_room)
        else:
            patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            store.save(make_checkpoint(2 if again else 3))
    assert names_in(tmp_path) == ["round-000001", "round-000002"]
    assert_holds(store, 1, 2)
    assert_holds(make_store(tmp_path), 1, 2)
    store.save(make_checkpoint(3))  # room was made
    assert_holds(store, 2, 3)


def test_all_is_forced_to_disk_before_the_name_appears_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    events: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        synced = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append((synced.name, (tmp_path / "round-000001").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    store.save(make_checkpoint(1))
    assert events == [
        (TENSORS_FILE, False),
        (FACTS_FILE, False),
        (".round-000001.new.tmp", False),
        (tmp_path.name, True),
    ]


# ---------------------------------------------------------------------- SIGKILL


def test_a_process_killed_at_any_moment_leaves_whole_checkpoints_and_loses_at_most_the_newest(
    tmp_path: Path,
) -> None:
    """See `tests.killed_saves`, which checks the store after every kill."""
    command = [sys.executable, "-m", "tests.killed_saves", str(tmp_path / "store"), str(KILLS), "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["kills"] == KILLS
    # It did hit what it is about: processes died in the middle of a save, and left halves.
    assert figures["killed_in_a_save"] > KILLS / 2
    assert figures["left_over_folders"] > KILLS / 20
    assert figures["saves"] > KILLS / 10
