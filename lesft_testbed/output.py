"""The folder that a command leaves its results in."""

import fcntl
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lesft.errors import InvalidInput
from lesft.files import check_output_folder

LOCK_FILE = "lock"

OUTPUT_USERS = "lesft-testbed run, serve or chaos"
"""The commands that hold a run's folder."""


@contextmanager
def fresh_output(output: Path, ours: Collection[str], pattern: str = "") -> Iterator[None]:
    """An empty folder, without an earlier run's results, for this process alone.

    Those are known by their names: `ours`, or what the regular expression matches as a whole.
    Raises InvalidInput when there are other files, or when another process has the folder.
    """
    check_output_folder(output)
    entries = list(output.iterdir()) if output.exists() else []
    foreign = sorted(
        entry.name
        for entry in entries
        if entry.name not in (*ours, LOCK_FILE) and not re.fullmatch(pattern, entry.name)
    )
    if foreign:
        raise InvalidInput(
            f"--output {output} holds {foreign[0]!r}, which no run of the testbed has written: "
            "give a folder of its own"
        )
    with locked_output(output, OUTPUT_USERS):
        for entry in output.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK_FILE:
                entry.unlink()
        yield


@contextmanager
def locked_output(output: Path, command: str, hint: str = "") -> Iterator[None]:
    """Hold the folder for this process alone, making it first; the lock goes with the process.

    Raises InvalidInput when another one has it; `hint` ends the message.
    """
    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"--output {output} is in use by another {command}: wait for that one, or use "
                f"another folder{hint}"
            ) from None
        yield
