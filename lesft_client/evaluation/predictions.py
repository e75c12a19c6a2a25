"""What the model answered so far, a line a question, written at once: an evaluation can go on."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from lesft.errors import DataError
from lesft_client.append_file import (
    AppendFile,
    Conditions,
    Record,
    differing_names,
    open_for_appending,
)
from lesft_client.language_model import FinishReason

PREDICTIONS_FILE = "predictions.jsonl"


class Prediction(Record):
    """What came of one question."""

    prompt: str
    """`Asked.digest`."""
    expected: str
    extracted: str | None = None
    """The answer by the chosen reading; null where there is none."""
    right: bool | None = None
    """Null where no answer was asked for."""
    readings: dict[str, str | None] = Field(default_factory=dict)
    """The answer by every reading, the chosen one among them."""
    text: str = ""
    """What the model wrote; empty where letters were compared."""
    finish_reason: FinishReason | None = None
    log_probs: dict[str, float] | None = None
    """log P of each letter in nats, where they were compared."""
    prompt_tokens: int
    tokens: int = 0
    """Tokens that the model wrote."""
    nll: float | None = None
    """Sum of -log P in nats over the tokens of the data's own solution, where it was scored."""
    nll_tokens: int = 0
    """These tokens, the end token among them."""


def fingerprint_of(conditions: Conditions) -> str:
    """`sha256:` and 16 hex digits over the conditions."""
    data = json.dumps(dict(conditions), sort_keys=True).encode()
    return f"sha256:{hashlib.sha256(data).hexdigest()[:16]}"


class Predictions(AppendFile[Prediction]):
    """The predictions by their index, and the file that keeps them."""

    record_type = Prediction
    forced_to_disk = False
    way_out = "restore the file, or use another --output, or --fresh to ask everything anew"

    def difference(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
        then, now = dict(theirs["conditions"]), ours["conditions"]
        began, begins = theirs["fingerprint"], ours["fingerprint"]
        differing = differing_names(then, now)
        if not differing:
            return ""
        # What only one of two measures has says less than the measure.
        differing = [name for name in differing if name in then and name in now] or differing
        return (
            f"{', '.join(f'{name} {then.get(name)}' for name in differing)} (fingerprint {began}), "
            f"this is {', '.join(f'{name} {now.get(name)}' for name in differing)} ({begins}): "
            "use another --output, or --fresh to drop what is there"
        )

    def check(self, index: int, prompt: str) -> None:
        """Raise DataError when what is kept for a question was answered to another prompt."""
        kept = self.by_index.get(index)
        if kept is not None and kept.prompt != prompt:
            raise DataError(
                f"{self.path}: question {index} was asked with prompt {kept.prompt}, now it is "
                f"{prompt}: the tokenizer has changed; use another --output, or --fresh to ask "
                "everything anew"
            )


@contextmanager
def open_predictions(folder: Path, conditions: Conditions, fresh: bool) -> Iterator[Predictions]:
    """The predictions in a folder, for this process alone; with `fresh`, none of the earlier ones.

    Raises InvalidInput when another process has them or they were made under other conditions,
    DataError when the file is damaged.
    """
    path = folder / PREDICTIONS_FILE
    header = {"fingerprint": fingerprint_of(conditions), "conditions": dict(conditions)}
    with open_for_appending(path, "evaluate") as file:
        predictions = Predictions(path, file, header)
        if fresh:
            predictions.begin()
        else:
            predictions.read()
        yield predictions
