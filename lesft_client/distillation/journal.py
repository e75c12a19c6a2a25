"""What is done so far, one line a question, durable before the next one is begun."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lesft_client.append_file import (
    AppendFile,
    Conditions,
    Record,
    differing_names,
    open_for_appending,
)
from lesft_client.distillation.verdict import Fault


class Outcome(Record):
    """What came of one question: a target after so many tries, or none."""

    target: str
    """Empty where the question was given up."""
    tries: int
    faults: tuple[Fault, ...]
    """Of the tries that were not kept, in order."""
    prompt_tokens: int
    completion_tokens: int


class Journal(AppendFile[Outcome]):
    """The outcomes by the question's index, and the file that keeps them."""

    record_type = Outcome
    forced_to_disk = True
    way_out = "restore the file, or remove it to ask everything anew"

    def difference(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
        then, now = dict(theirs["fingerprint"]), ours["fingerprint"]
        differing = differing_names(then, now)
        if not differing:
            return ""
        name = differing[0]
        return (
            f"{name} {then.get(name)!r}, this is {now.get(name)!r}: go on with the settings of "
            "then, choose another --output, or remove that file to begin anew"
        )


@contextmanager
def open_journal(path: Path, fingerprint: Conditions) -> Iterator[Journal]:
    """The journal at `path`, for this process alone; a file without an outcome is removed again.

    Raises InvalidInput when another process writes it, and as `Journal.read`.
    """
    with open_for_appending(path, "distill") as file:
        journal = Journal(path, file, {"fingerprint": dict(fingerprint)})
        journal.read()
        try:
            yield journal
        finally:
            if not journal.by_index:
                path.unlink(missing_ok=True)
