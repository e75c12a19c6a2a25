"""What the shares of clients may differ in: a label of each sample, and how many have which."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from lesft.errors import DataError
from lesft_client.data.answers import MARK
from lesft_client.data.samples import Sample

Skew = Literal["none", "label", "answer", "steps", "size"]
"""In what shares differ: in nothing but chance, in a label of their samples, or in size."""

_BY_LABEL: dict[Skew, str] = {
    "label": "label",
    "answer": "final answer",
    "steps": "number of steps",
}
_LETTER = re.compile(r"[A-Z]")
_MOST_COUNTED = 50
_UNLABELLED = "no label"


def skew_labels(samples: Sequence[Sample], skew: Skew) -> list[str]:
    """Each sample's value of what the skew is over; for `size` they are all the same.

    Final answers must be letters of choices: numbers are nearly all different, so that a skew over
    them would be none. Other answers that recur, such as yes and no, can be given as labels.
    Raises DataError where the samples have no such labels, with the skews that they do have.
    """
    labels = [_label(sample, skew) for sample in samples]
    fault = _fault(labels, skew)
    if fault:
        usable = [
            other
            for other in _BY_LABEL
            if not _fault([_label(sample, other) for sample in samples], other)
        ]
        possible = " or ".join(f"--skew {other}" for other in [*usable, "size"])
        raise DataError(f"--skew {skew}: {fault}; they can have {possible}")
    return labels


def label_counts(samples: Sequence[Sample], skew: Skew) -> dict[str, int]:
    """How many samples have which label: the one that the skew is over, else `Sample.label`.

    Labels are in alphabetical order, numbers in that of their size. Empty where no sample has a
    label, and where there are more than 50 different ones, of which nobody reads a list.
    """
    by = skew if skew in _BY_LABEL else "label"
    counts = Counter(_label(sample, by) for sample in samples)
    if set(counts) == {""} or len(counts) > _MOST_COUNTED:
        return {}
    return {label or _UNLABELLED: counts[label] for label in sorted(counts, key=_by_size)}


def num_steps(target: str) -> int:
    """The lines of a worked solution, without blank ones and the final `#### ` line."""
    steps, mark, _ = target.rpartition(MARK)
    return sum(bool(line.strip()) for line in (steps if mark else target).split("\n"))


def _label(sample: Sample, skew: Skew) -> str:
    if skew == "label":
        return sample.label
    if skew == "answer":
        return sample.answer
    return str(num_steps(sample.target)) if skew == "steps" else ""


def _fault(labels: Sequence[str], skew: Skew) -> str:
    """Why shares cannot be skewed by these labels; empty where they can."""
    if skew not in _BY_LABEL:
        return ""
    name = _BY_LABEL[skew]
    missing, different = labels.count(""), len(set(labels))
    if missing:
        return f"{missing} of {len(labels)} samples have no {name}"
    if different == 1:
        return f"all {len(labels)} samples have the same {name}"
    others = sum(not _LETTER.fullmatch(label) for label in labels)
    if skew == "answer" and others:
        return (
            f"{others} of {len(labels)} samples have a final answer that is no letter of a choice"
        )
    return ""


def _by_size(label: str) -> tuple[int, str]:
    return (len(label) if label.isdecimal() else 0, label)
