"""Small folders laid out as the real data sets are, and a model that is opened as any other."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from lesft_client.language_model import LanguageModel


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k(folder: Path, count: int = 12) -> str:
    """Questions whose answer is their own number, doubled."""
    for split in ("train", "test"):
        rows = [
            {"question": f"Double {n} ({split})?", "answer": f"<<2*{n}={2 * n}>>\n#### {2 * n}"}
            for n in range(1, count + 1)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return str(folder)


def commonsense_qa(folder: Path, count: int = 6) -> str:
    """Questions whose answers are the letters in turn."""
    choices = [{"label": label, "text": f"thing {label.lower()}"} for label in "ABCDE"]
    for split in ("train", "validation"):
        rows = [
            {
                "id": f"{split}-{n}",
                "answerKey": "ABCDE"[n % 5],
                "question": {"stem": f"Which is {n} ({split})?", "choices": choices},
            }
            for n in range(count)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return str(folder)


@asynccontextmanager
async def opened(model: LanguageModel) -> AsyncIterator[LanguageModel]:
    """What `open_model` returns, for a model that is there already."""
    yield model
