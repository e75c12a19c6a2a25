"""The folder that a command leaves its results in."""

import fcntl
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lesft.errors import InvalidInput


def prepare_output(output: Path, ours: Collection[str], suffixes: Collection[str] = ()) -> None:
    """An empty folder, without an earlier run's results.

    Those are known by their names, `ours`, or their `suffixes`. Raises InvalidInput when there are
    other files.
    """
    if output.exists() and not output.is_dir():
        raise InvalidInput(f"--output {output} must be a folder, but it is a file")
    output.mkdir(parents=True, exist_ok=True)
    entries = list(output.iterdir())
    foreign = sorted(e.name for e in entries if e.name not in ours and e.suffix not in suffixes)
    if foreign:
        raise InvalidInput(
            f"--output {output} holds {foreign[0]!r}, which no run of the testbed has written: "
            "give a folder of its own"
        )
    for entry in entries:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def locked_output(output: Path, command: str, hint: str = "") -> Iterator[None]:
    """Hold the folder for this process alone, making it first; the lock goes with the process.

    Raises InvalidInput when another one has it; `hint` ends the message.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"--output {output} is in use by another {command}: wait for that one, or use "
                f"another folder{hint}"
            ) from None
        yield
