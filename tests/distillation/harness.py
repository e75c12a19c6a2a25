"""A small data set on disk, and settings to distill it with."""

import json
from pathlib import Path
from typing import Any

from lesft_client.data import Sample, load_samples
from lesft_client.distillation.command import distill
from lesft_client.distillation.pace import Backoff
from lesft_client.distillation.settings import DistillSettings
from tests.distillation.fake_teacher import Reply, says

FAST = Backoff(0.01, 0.02)


def make_folder(folder: Path, count: int) -> Path:
    """A data set laid out like gsm8k: question n asks for 2n."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": f"How much is twice {n}?", "answer": f"Add {n} and {n}.\n#### {2 * n}"}
        for n in range(1, count + 1)
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def number_in(prompt: str) -> int:
    """The n that a prompt asks twice of."""
    return int(prompt.rpartition("twice ")[2].rstrip("?"))


def right(prompt: str) -> Reply:
    return says(f"It is {right_text(prompt)}")


def right_text(prompt: str) -> str:
    n = number_in(prompt)
    return f"2 * {n}.\n#### {2 * n}"


def settings_for(folder: Path, url: str, **changes: Any) -> DistillSettings:
    """Settings that write `out.jsonl` beside the data folder."""
    given: dict[str, Any] = {
        "data": str(folder),
        "teacher": url,
        "teacher_model": "small",
        "output": folder.parent / "out.jsonl",
        "progress": "lines",
        "timeout_seconds": 5,
        "patience_seconds": 5,
    }
    return DistillSettings(**{**given, **changes})


def run(settings: DistillSettings) -> str:
    return distill(settings, FAST)


def made(settings: DistillSettings) -> list[Sample]:
    """The training set as `lesft-client train` reads it, in any order."""
    trained = load_samples(str(settings.output), "train", None, 0)
    alone = settings.output.read_bytes().count(b"\n") == 1
    return trained + ([] if alone else load_samples(str(settings.output), "test", None, 0))


def meta(settings: DistillSettings) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(settings.meta_file.read_text())
    return found
