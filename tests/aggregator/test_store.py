"""What survives a crash: the store is opened again after each stage of its two changes."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from sqlalchemy.orm import Session

from lesft.errors import InvalidInput
from lesft_aggregator import store as store_module
from lesft_aggregator.adapters import read_layout
from lesft_aggregator.store import DATABASE_FILE, Store
from tests.aggregator.harness import (
    NAME,
    Caller,
    make_adapter,
    make_tensors,
    run_aggregator,
    settings_for,
)


class PowerCutError(Exception):
    """Stands for the moment from which on nothing happens any more."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, "lesft")
    yield opened
    opened.close()


def add(store: Store, client_id: str, seed: int, num_samples: int = 10) -> None:
    data = make_adapter(seed)
    store.add_submission(0, client_id, num_samples, data, read_layout(data))


def power_cut(*_: Any, **__: Any) -> None:
    raise PowerCutError


def nothing(*_: Any, **__: Any) -> None:
    """The process died, so nothing is cleaned up either."""


def before_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store_module, "write_atomically", power_cut)


def before_fsync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", power_cut)
    patch.setattr(Path, "unlink", nothing)


def before_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "replace", power_cut)
    patch.setattr(Path, "unlink", nothing)


def before_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Session, "flush", power_cut)


def before_delete(patch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def cut_at_submissions(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("00000-"):
            raise PowerCutError
        unlink(path, missing_ok)

    patch.setattr(Path, "unlink", cut_at_submissions)


Stage = Callable[[pytest.MonkeyPatch], None]
BEFORE_ROW = [before_write, before_fsync, before_rename, before_commit]


def cut(change: Callable[[], object], stage: Stage) -> None:
    """Runs a change of the store up to a stage."""
    with pytest.MonkeyPatch.context() as patch:
        stage(patch)
        with pytest.raises(PowerCutError):
            change()


def files(state: Path) -> list[str]:
    kept = [*(state / "submissions").iterdir(), *(state / "adapters").iterdir()]
    return sorted(path.name for path in kept)


@pytest.mark.parametrize("stage", BEFORE_ROW)
def test_a_submission_cut_off_before_its_row_leaves_nothing_and_can_be_repeated(
    stage: Stage, tmp_path: Path
) -> None:
    store = Store(tmp_path, "lesft")
    add(store, "a", 1)
    cut(lambda: add(store, "b", 2), stage)
    store.close()

    again = Store(tmp_path, "lesft")
    assert [part.client_id for part in again.submissions(0)] == ["a"]
    assert [client.client_id for client in again.clients()] == ["a"]
    assert again.submission_path(0, "a").read_bytes() == make_adapter(1)
    assert files(tmp_path) == ["00000-a.safetensors"]
    add(again, "b", 2)
    assert [part.client_id for part in again.submissions(0)] == ["a", "b"]
    assert again.submission_path(0, "b").read_bytes() == make_adapter(2)
    again.close()


@pytest.mark.parametrize("stage", BEFORE_ROW)
def test_a_publication_cut_off_before_its_row_is_done_again_from_the_same_submissions(
    stage: Stage, tmp_path: Path
) -> None:
    store = Store(tmp_path, "lesft")
    add(store, "a", 1, num_samples=10)
    add(store, "b", 2, num_samples=30)
    cut(lambda: store.publish(1, store.submissions(0), make_adapter(9)), stage)
    store.close()

    again = Store(tmp_path, "lesft")
    assert again.version() == 0
    assert files(tmp_path) == ["00000-a.safetensors", "00000-b.safetensors"]
    again.close()
    check_first_version(tmp_path)


def test_a_publication_cut_off_after_its_row_is_not_done_again(tmp_path: Path) -> None:
    store = Store(tmp_path, "lesft")
    add(store, "a", 1)
    add(store, "b", 2)
    cut(lambda: store.publish(1, store.submissions(0), make_adapter(9)), before_delete)
    store.close()
    assert files(tmp_path) == ["00000-a.safetensors", "00000-b.safetensors", "00001.safetensors"]

    again = Store(tmp_path, "lesft")
    assert again.version() == 1
    assert files(tmp_path) == ["00001.safetensors"]
    assert again.adapter_path(1).read_bytes() == make_adapter(9)
    again.close()

    async def scenario(aggregator: Any, caller: Caller, addresses: Any) -> None:
        _, tensors = await caller.fetch(1)
        assert np.array_equal(tensors[NAME], make_tensors(9)[NAME])
        assert (await caller.join("a")).version == 1

    run_aggregator(settings_for(tmp_path), scenario)


def check_first_version(state: Path) -> None:
    """An aggregator that starts here averages submissions 1 and 2, with 10 and 30 samples."""

    async def scenario(aggregator: Any, caller: Caller, addresses: Any) -> None:
        header, tensors = await caller.fetch(1)
        assert (list(header.client_ids), header.num_samples) == (["a", "b"], 40)
        parts = [make_tensors(1)[NAME], make_tensors(2)[NAME]]
        dense = np.average(parts, axis=0, weights=[10.0, 30.0]).astype(np.float32)
        assert np.array_equal(tensors[NAME], dense)

    run_aggregator(settings_for(state), scenario)


def test_a_restart_goes_on_with_the_submissions_and_versions_it_has(tmp_path: Path) -> None:
    async def before(aggregator: Any, caller: Caller, addresses: Any) -> None:
        await caller.submit("a", make_adapter(5))
        await caller.submit("b", make_adapter(5))
        await caller.fetch(1)
        await caller.submit("b", make_adapter(2), base_version=1, num_samples=30)

    async def after(aggregator: Any, caller: Caller, addresses: Any) -> None:
        assert (await caller.join("a")).version == 1
        repeat = await caller.submit("b", make_adapter(2), base_version=1, num_samples=30)
        assert (repeat.version, repeat.received) == (2, 1)
        await caller.submit("a", make_adapter(1), base_version=1)
        header, tensors = await caller.fetch(2)
        assert header.num_samples == 40
        parts = [make_tensors(1)[NAME], make_tensors(2)[NAME]]
        dense = np.average(parts, axis=0, weights=[10.0, 30.0]).astype(np.float32)
        assert np.array_equal(tensors[NAME], dense)
        _, first = await caller.fetch(1)
        assert np.array_equal(first[NAME], make_tensors(5)[NAME])

    run_aggregator(settings_for(tmp_path), before)
    run_aggregator(settings_for(tmp_path), after)


def test_fewer_clients_after_a_restart_close_the_open_round_at_once(tmp_path: Path) -> None:
    async def before(aggregator: Any, caller: Caller, addresses: Any) -> None:
        await caller.submit("a", make_adapter(1))

    async def after(aggregator: Any, caller: Caller, addresses: Any) -> None:
        header, _ = await caller.fetch(1)
        assert list(header.client_ids) == ["a"]

    run_aggregator(settings_for(tmp_path, clients=2), before)
    run_aggregator(settings_for(tmp_path, clients=1), after)


def test_submissions_lose_their_files_once_averaged_but_keep_their_rows(
    store: Store, tmp_path: Path
) -> None:
    add(store, "b", 2)
    add(store, "a", 1)
    assert files(tmp_path) == ["00000-a.safetensors", "00000-b.safetensors"]
    store.publish(1, store.submissions(0), make_adapter(9))
    assert files(tmp_path) == ["00001.safetensors"]
    assert [part.client_id for part in store.submissions(0)] == ["a", "b"]
    adapter = store.adapter(1)
    assert adapter is not None
    assert (adapter.client_ids, adapter.num_samples) == (["a", "b"], 20)
    assert np.array_equal(load(store.adapter_path(1).read_bytes())[NAME], make_tensors(9)[NAME])


def test_every_commit_is_forced_to_disk(store: Store) -> None:
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_a_file_and_then_its_folder_are_forced_to_disk_before_the_row_is_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace, flush = os.fsync, Path.replace, Session.flush

    def log_fsync(handle: int) -> None:
        steps.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "fsync file")
        fsync(handle)

    def log_replace(path: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(path, target)

    def log_flush(session: Session, *args: Any) -> None:
        if session.new:
            steps.append("row")
        flush(session, *args)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    monkeypatch.setattr(Session, "flush", log_flush)
    add(store, "a", 1)
    assert steps[:4] == ["fsync file", "rename", "fsync folder", "row"]


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, "first").close()
    with pytest.raises(InvalidInput, match="belongs to run 'first', not to 'second'"):
        Store(tmp_path, "second")
    Store(tmp_path, "first").close()


def test_two_aggregators_cannot_share_a_state(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is in use by another aggregator"):
        Store(tmp_path, "lesft")


def test_a_lost_or_changed_file_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, "lesft")
    add(store, "a", 1)
    path = store.submission_path(0, "a")
    store.close()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match=r"00000-a\.safetensors must have \d+ bytes but is"):
        Store(tmp_path, "lesft")
    path.unlink()
    with pytest.raises(InvalidInput, match=r"00000-a\.safetensors must have \d+ bytes but is"):
        Store(tmp_path, "lesft")


def test_a_database_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / DATABASE_FILE).write_bytes(b"not a database, but long enough to look" * 10)
    with pytest.raises(InvalidInput, match=r"aggregator\.sqlite cannot be used: file is not a"):
        Store(tmp_path, "lesft")
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / DATABASE_FILE).execute("PRAGMA schema_version")
