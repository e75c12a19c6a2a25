"""What the server keeps of clients that do not train: files that last, within a limit."""

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lesft.errors import OutOfOrder
from lesft.micro_batch import MicroBatch, StepKey
from lesft.spec import RunSpec
from lesft_server import sample_store
from lesft_server.sample_store import SAMPLES_FOLDER, HeldSamples, SampleStore
from tests.server.harness import random_path, random_targets
from tests.training.by_hand import run_spec

FIRST, SECOND = StepKey(0, 0), StepKey(0, 1)
PLENTY = 1 << 20


def sent(key: StepKey, samples: Sequence[int], enclosed: Sequence[int]) -> MicroBatch:
    """A micro-batch whose enclosed samples' contents depend on their numbers alone."""
    singles = [
        (random_path([5 + n], seed=n), random_path([6 + n], seed=50 + n), random_targets([2 + n]))
        for n in enclosed
    ]
    empty = random_path([0]).activations_ND
    base, reference = (
        replace(
            random_path([0]),
            activations_ND=torch.cat([empty, *(single[i].activations_ND for single in singles)]),
            lengths=tuple(single[i].lengths[0] for single in singles),
        )
        for i in (0, 1)
    )
    targets = replace(
        random_targets([0]),
        ids_T=torch.cat([random_targets([0]).ids_T, *(single[2].ids_T for single in singles)]),
        lengths=tuple(single[2].lengths[0] for single in singles),
    )
    return MicroBatch(
        key, base, reference if singles else None, targets, tuple(samples), tuple(enclosed)
    )


def assert_same(batch: MicroBatch, expected: MicroBatch) -> None:
    assert (batch.key, batch.samples) == (expected.key, expected.samples)
    assert batch.reference is not None
    assert expected.reference is not None
    for path, right in ((batch.base, expected.base), (batch.reference, expected.reference)):
        assert path.lengths == right.lengths
        assert torch.equal(path.activations_ND, right.activations_ND)
    assert batch.targets.lengths == expected.targets.lengths
    assert torch.equal(batch.targets.ids_T, expected.targets.ids_T)


def files(state: Path) -> list[Path]:
    return sorted(path for path in (state / SAMPLES_FOLDER).rglob("*") if path.is_file())


def fill(
    state: Path, max_bytes: int = PLENTY, spec: RunSpec | None = None
) -> tuple[SampleStore, HeldSamples]:
    """A store to which client `a` has sent its samples 0 and 2."""
    store = SampleStore(state, spec or run_spec(), max_bytes)
    held = store.of("a", "phone")
    held.complete(sent(FIRST, [0, 2], [0, 2]))
    return store, held


# ---------------------------------------------------------------------- what comes back


def test_what_was_sent_before_is_put_in_its_place_among_what_is_enclosed(tmp_path: Path) -> None:
    _, held = fill(tmp_path)
    assert held.numbers == [0, 2]
    whole, _ = held.complete(sent(SECOND, [2, 1, 0], [1]))
    assert_same(whole, sent(SECOND, [2, 1, 0], [2, 1, 0]))
    assert held.numbers == [0, 1, 2]
    assert held.among([2, 5, 0, 2]) == [0, 2]


def test_a_sample_may_stand_twice_in_a_micro_batch(tmp_path: Path) -> None:
    _, held = fill(tmp_path)
    for enclosed in ([1], []):
        whole, _ = held.complete(sent(SECOND, [1, 1], enclosed))
        assert whole.base.lengths == (6, 6)
        assert torch.equal(
            whole.base.activations_ND, random_path([6], 1).activations_ND.repeat(2, 1)
        )


def test_a_request_is_the_same_whether_its_samples_are_enclosed_or_held(tmp_path: Path) -> None:
    _, held = fill(tmp_path)
    digests = [
        held.complete(sent(key, samples, enclosed))[1]
        for key, samples, enclosed in (
            (FIRST, [0, 2], [0, 2]),
            (FIRST, [0, 2], [2]),
            (FIRST, [0, 2], []),
            (SECOND, [0, 2], []),
            (FIRST, [2, 0], []),
            (FIRST, [2], []),
        )
    ]
    assert len(set(digests[:3])) == 1
    assert len(set(digests)) == 4


def test_another_content_under_a_held_number_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    _, held = fill(tmp_path)
    other = replace(sent(SECOND, [2], [2]), targets=random_targets([4], seed=9))
    with pytest.raises(OutOfOrder) as caught:
        held.complete(other)
    assert str(caught.value) == (
        "client 'a' sent round 0 micro-batch 1 with other activations or labels before: a client "
        "must not fork; start it with the same data, --device, --precision and --threads as before"
    )
    whole, _ = held.complete(sent(SECOND, [2], []))
    assert_same(whole, sent(SECOND, [2], [2]))


def test_a_sample_that_is_neither_enclosed_nor_held_is_named(tmp_path: Path) -> None:
    _, held = fill(tmp_path)
    held.check_complete([0, 1, 2], [1])
    with pytest.raises(OutOfOrder) as caught:
        held.check_complete([4, 0, 3], [])
    assert str(caught.value) == ("sample 3 of client 'a' is not held here: enclose its activations")


# ---------------------------------------------------------------------- another process


def test_another_process_holds_the_same_samples(tmp_path: Path) -> None:
    store, _ = fill(tmp_path)
    again = SampleStore(tmp_path, run_spec(), PLENTY)
    size = sum(path.stat().st_size for path in files(tmp_path))
    assert (again.num_bytes, store.num_bytes) == (size, size)
    held = again.of("a", "phone")
    assert held.numbers == [0, 2]
    whole, _ = held.complete(sent(SECOND, [2, 0], []))
    assert_same(whole, sent(SECOND, [2, 0], [2, 0]))


def test_damaged_and_unfinished_files_are_dropped_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    first, second = files(tmp_path)
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    unfinished = first.with_name(f".{first.name}.1.tmp")
    unfinished.write_bytes(first.read_bytes())
    again = SampleStore(tmp_path, run_spec(), PLENTY)
    assert files(tmp_path) == [first]
    assert again.num_bytes == first.stat().st_size
    assert again.of("a", "phone").numbers == [0]
    assert f"{second} is damaged; its client sends it again" in caplog.text


def test_samples_of_another_run_are_dropped(tmp_path: Path) -> None:
    fill(tmp_path)
    other = SampleStore(tmp_path, run_spec(front_fingerprint="sha256:1"), PLENTY)
    assert (other.num_bytes, files(tmp_path)) == (0, [])
    assert other.of("a", "phone").numbers == []


# ---------------------------------------------------------------------- clients apart


def test_another_instance_of_a_client_has_none_of_the_earlier_ones_samples(tmp_path: Path) -> None:
    store, _ = fill(tmp_path)
    store.of("b", "phone").complete(sent(FIRST, [1], [1]))
    assert store.of("a", "tablet").numbers == []
    [left] = files(tmp_path)
    assert store.num_bytes == left.stat().st_size
    assert store.of("b", "phone").numbers == [1]


@pytest.mark.parametrize("name", ["..", ".", "...", "x" * 64, "CON", "a/../../b", "", "\x00"])
def test_whatever_a_client_calls_itself_its_samples_stay_in_their_folder(
    name: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    store = SampleStore(state, run_spec(), PLENTY)
    for client_id, instance_id in ((name, "phone"), ("a", name)):
        held = store.of(client_id, instance_id)
        held.complete(sent(FIRST, [1], [1]))
        assert store.of(client_id, instance_id).numbers == [1]
    assert len(files(state)) == 2
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files(state)


def test_what_another_session_is_writing_is_not_taken_for_a_sample(tmp_path: Path) -> None:
    store, _ = fill(tmp_path)
    first = files(tmp_path)[0]
    first.with_name(f".{first.name}.1.tmp").write_bytes(b"half")
    assert store.of("a", "phone").numbers == [0, 2]


def test_a_sample_that_two_sessions_of_a_client_bring_counts_once(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, run_spec(), PLENTY)
    for held in [store.of("a", "phone"), store.of("a", "phone")]:
        held.complete(sent(FIRST, [1], [1]))
        assert held.numbers == [1]
    assert store.num_bytes == files(tmp_path)[0].stat().st_size


# ---------------------------------------------------------------------- no room


def test_nothing_is_kept_beyond_the_limit_and_all_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, held = fill(tmp_path)
    size = store.num_bytes
    assert held.numbers == [0, 2]
    for limit, kept in ((size, [0, 2]), (size - 1, [0]), (0, [])):
        state = tmp_path / f"{limit}"
        caplog.clear()
        store, held = fill(state, limit)
        assert held.numbers == kept
        assert store.num_bytes == sum(path.stat().st_size for path in files(state)) <= limit
        whole, _ = held.complete(sent(SECOND, [2, 0], [2, 0]))
        assert_same(whole, sent(SECOND, [2, 0], [2, 0]))
        said = "no room for more activations, clients send them again: --kept-activations-mib is 0"
        assert caplog.text.count(said) == (kept != [0, 2]), "it is said once"


def test_a_full_disk_keeps_nothing_and_leaves_no_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = sample_store.write_atomically

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sample_store, "write_atomically", full)
    store, held = fill(tmp_path)
    assert (store.num_bytes, held.numbers, files(tmp_path)) == (0, [], [])
    assert "No space left on device" in caplog.text
    monkeypatch.setattr(sample_store, "write_atomically", write)
    held.complete(sent(SECOND, [2], [2]))
    assert held.numbers == [2]
