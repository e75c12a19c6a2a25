"""Saves checkpoints in child processes that are killed at random moments; says what was left.

`python -m tests.killed_saves FOLDER KILLS SEED`: writes figures as JSON, or fails with the
first store that breaks a promise. Each child is forked from a process that has torch already.
"""

import json
import logging
import os
import random
import select
import signal
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from lesft.checkpoints import Checkpoint, CheckpointStore

RUN = "run"


def make_checkpoint(round_index: int, course: int) -> Checkpoint:
    """What must be found again; every child that goes on takes a course of its own."""
    generator = torch.Generator().manual_seed(round_index << 16 | course)
    tensors = {
        "lora.a": torch.randn(64, 16, generator=generator),
        "exp_avg.a": torch.randn(64, 16, generator=generator),
        "optimizer.steps": torch.tensor([round_index]),
    }
    return Checkpoint(round_index, tensors, {"course": course})


def save_until_killed(folder: Path, base: int, course: int, seed: int, pipe: int) -> None:
    """Go on from the checkpoint of `base`; tells every save's beginning and its end."""
    rng = random.Random(seed)
    store = CheckpointStore(folder, RUN)
    round_index = base
    while True:
        round_index += rng.randint(1, 2)
        checkpoint = make_checkpoint(round_index, course)
        os.write(pipe, struct.pack("!ci", b"b", round_index))
        store.save(checkpoint)
        os.write(pipe, struct.pack("!ci", b"d", round_index))


def kill_one(
    folder: Path, base: int, course: int, seed: int, seconds: float
) -> tuple[list[int], list[int]]:
    """So many seconds after its first save begins.

    Returns the rounds whose save began, and those whose save was over.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            save_until_killed(folder, base, course, seed, writing)
        finally:
            os._exit(1)  # only an error gets here
    os.close(writing)
    select.select([reading], [], [])  # until the first save begins
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child failed by itself"
    with os.fdopen(reading, "rb") as pipe:
        told = [struct.unpack("!ci", piece) for piece in iter(lambda: pipe.read(5), b"")]
    return [r for what, r in told if what == b"b"], [r for what, r in told if what == b"d"]


def check(folder: Path) -> dict[int, int]:
    """Open the store that a killed process left; returns its rounds with their courses."""
    store = CheckpointStore(folder, RUN)
    courses = {}
    for index in store.rounds():
        loaded = store.load(index)
        courses[index] = loaded.facts["course"]
        expected = make_checkpoint(index, courses[index]).tensors
        assert loaded.tensors.keys() == expected.keys()
        assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)
    assert not list(folder.glob(".*")), "left-over folders are cleared away"
    return courses


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    damaged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: damaged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lesft").addHandler(handler)
    rng = random.Random(seed)
    CheckpointStore(folder, RUN).save(make_checkpoint(0, 0))
    before, figures = {0: 0}, Counter[str](kills=kills)
    latest = 0.015
    for course in range(1, kills + 1):
        base = rng.choice(list(before))  # the newest, or going back
        begun, done = kill_one(folder, base, course, rng.randrange(1 << 30), rng.uniform(0, latest))
        latest *= 0.9 if done else 1.1  # so that half of them save anything, however busy the disk
        figures["saves"] += len(done)
        figures["killed_in_a_save"] += len(begun) > len(done)
        figures["left_over_folders"] += len(list(folder.glob(".*.tmp")))
        after = check(folder)
        written = after.get(begun[-1]) == course  # told or not: the kill may have come between
        figures["written_but_not_told"] += written and begun != done
        kept, its_course = (done[-1], course) if done else (base, before[base])
        assert written or after.get(kept) == its_course, (
            f"{kept} of course {its_course} was on disk for good, {after} is left"
        )
        for index, found in after.items():
            was_there = before.get(index) == found
            assert was_there or (found == course and index in begun), f"{index}: nobody wrote it"
        before = after
    figures["half_removed"] = len(damaged)
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
