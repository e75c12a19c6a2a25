"""What the client keeps for the process after it: its checkpoints, its status, its instance."""

import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lesft import files
from lesft.errors import InvalidInput
from lesft.files import lock_folder
from lesft.wire import WireCounter
from lesft_client.data import EncodedSample
from lesft_client.recovery import CHECKPOINTS_FOLDER, ClientCheckpoints, drop_state, instance_id
from lesft_client.status import Status

SAMPLES = [EncodedSample([5, 6], [7, 8, 9], [10, 2]), EncodedSample([5], [7], [11, 2])]
TENSORS = {"lora.a": torch.tensor([1.5, -0.0]), "optimizer.steps": torch.tensor([3])}


def make_checkpoints(
    state: Path,
    client_id: str = "a",
    samples: list[EncodedSample] = SAMPLES,
    run: str = "sha256:run",
    waits: list[str] | None = None,
) -> tuple[ClientCheckpoints, Status]:
    """As a process of its own has them."""
    status = Status(client_id, WireCounter())
    heard = [] if waits is None else waits
    return ClientCheckpoints(state, run, samples, status, status.wire, heard.append), status


def train_three_rounds(status: Status) -> None:
    status.loss_by_round = [2.5, 0.1 + 0.2, 1e-300]
    status.nll_by_round, status.class_counts_by_round = [0.5, None, 1.0], [(3, 2, 1), None, None]
    status.tokens, status.adapter_version, status.seconds_before = 600, 4, 12.5
    status.wire.add("up", "labels", 8)
    status.wire.add("down", "gradients", 90)


def test_another_process_goes_on_with_tensors_and_status_of_a_checkpoint(tmp_path: Path) -> None:
    kept, status = make_checkpoints(tmp_path)
    assert kept.rounds() == []
    train_three_rounds(status)
    kept.carried["held_out_before"] = {"nll_sum": 1.25, "tokens": 7}
    kept.save(3, TENSORS)
    saved = status.body()
    status.loss_by_round.append(1.0)
    status.tokens += 100
    kept.save(4, TENSORS)

    resumed, status = make_checkpoints(tmp_path)
    assert resumed.rounds() == [3, 4]
    status.wire.add("up", "other", 5)  # what it sent before it knew
    resumed.restore_status(3)
    tensors = resumed.load(3)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    body = status.body()
    wire = {**saved.wire, "up": {**saved.wire["up"], "other": 5}}
    assert body == saved.model_copy(update={"bytes_up": 8 + 5, "wire": wire})
    assert body.loss_by_round == [2.5, 0.1 + 0.2, 1e-300]
    assert body.nll_by_round == [0.5, None, 1.0]
    assert body.class_counts_by_round == [(3, 2, 1), None, None]
    assert (body.tokens, body.adapter_version, status.training_seconds()) == (600, 4, 12.5)
    assert status.wire.by_kind()["up"]["labels"] == 8
    assert resumed.carried == {"held_out_before": {"nll_sum": 1.25, "tokens": 7}}
    resumed.save(4, TENSORS)  # and carries it on
    again, _ = make_checkpoints(tmp_path)
    again.restore_status(4)
    assert again.carried == {"held_out_before": {"nll_sum": 1.25, "tokens": 7}}


def test_the_adapters_version_goes_back_with_the_checkpoint(tmp_path: Path) -> None:
    """What the process itself did since then, it did: tokens and bytes stay."""
    kept, status = make_checkpoints(tmp_path)
    train_three_rounds(status)
    kept.save(3, TENSORS)
    status.adapter_version, status.tokens = 5, 800
    kept.load(3)
    assert (status.adapter_version, status.tokens) == (4, 800)
    assert status.wire.total("up") == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"client_id": "b"},
            "--state {} belongs to client 'a', not to 'b': use another folder, or --client-id a",
        ),
        (
            {"samples": SAMPLES[:1]},
            "--state {}: the training samples are not those that the run began with: give the "
            "same --data, --data-seed, --samples, --share and --skew, or start anew with --fresh",
        ),
        ({"samples": SAMPLES[::-1]}, "--state {}: the training samples are not those"),
        (
            {"samples": [replace(SAMPLES[0], reference_ids=[7, 8, 8]), SAMPLES[1]]},
            "--state {}: the training samples are not those",
        ),
    ],
)
def test_the_state_of_another_client_or_of_other_data_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    kept, status = make_checkpoints(tmp_path)
    train_three_rounds(status)
    kept.save(3, TENSORS)
    other, status = make_checkpoints(tmp_path, **options)
    before = status.body()
    with pytest.raises(InvalidInput, match=re.escape(message.format(tmp_path))):
        other.restore_status(3)
    assert status.body() == before


def test_the_state_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    kept, _ = make_checkpoints(tmp_path)
    kept.save(0, TENSORS)
    with pytest.raises(InvalidInput, match="belongs to a run with other settings: use another"):
        make_checkpoints(tmp_path, run="sha256:other")


def test_a_full_disk_is_waited_for_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    kept, _ = make_checkpoints(tmp_path, waits=waits)
    kept.save(0, TENSORS)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if len(waits) < 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(files, "_ROOM_PAUSE_SECONDS", 0)
    kept.save(1, TENSORS)
    assert waits == [
        *2 * [f"no room on disk for {tmp_path}: free some, training goes on by itself"],
        "",
    ]
    assert make_checkpoints(tmp_path)[0].rounds() == [0, 1]


# ---------------------------------------------------------------------- the state folder


def test_the_instance_stays_with_its_folder_and_is_no_other_folders(tmp_path: Path) -> None:
    first = instance_id(tmp_path / "a", SAMPLES)
    assert re.fullmatch(r"[0-9a-f]{32}", first)
    assert instance_id(tmp_path / "a", SAMPLES) == first
    assert instance_id(tmp_path / "b", SAMPLES) != first


def test_with_other_samples_a_client_is_another_instance(tmp_path: Path) -> None:
    first = instance_id(tmp_path, SAMPLES)
    other = instance_id(tmp_path, SAMPLES[:-1])
    assert other != first
    assert instance_id(tmp_path, SAMPLES[:-1]) == other


def test_starting_anew_drops_what_an_earlier_run_left_and_nothing_else(tmp_path: Path) -> None:
    drop_state(tmp_path / "never was")
    before = instance_id(tmp_path, SAMPLES)
    make_checkpoints(tmp_path)[0].save(3, TENSORS)
    for name in ("adapter.safetensors", "result.json", "run_spec.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "adapter").mkdir()
    drop_state(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert not (tmp_path / CHECKPOINTS_FOLDER).exists()
    assert instance_id(tmp_path, SAMPLES) != before
    # Also those of another run, which is what it is for.
    assert make_checkpoints(tmp_path, run="sha256:other")[0].rounds() == []


def test_two_processes_cannot_share_a_state_folder_and_a_killed_one_leaves_it(
    tmp_path: Path,
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lesft.files import lock_folder\n"
        "lock_folder(Path(sys.argv[1]), 'client'); print('locked', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(InvalidInput) as caught:
                lock_folder(tmp_path, "client")
            assert str(caught.value) == (
                f"--state {tmp_path} is in use by another client: stop that one, or use another "
                "folder"
            )
        finally:
            other.send_signal(signal.SIGKILL)
    os.close(lock_folder(tmp_path, "client"))
