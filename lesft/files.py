"""Files that are whole or not there, also after a power cut."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lesft.errors import InvalidInput

log = logging.getLogger(__name__)

T = TypeVar("T")

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
_ROOM_PAUSE_SECONDS = 2.0
_ROOM_LOG_SECONDS = 60.0


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, force to disk, rename into place, force the folder's entry to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_and_sync(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk is not to fill up with halves
        raise
    sync_folder(path.parent)


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a file and force it to disk; its name is there for good after `sync_folder`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_umask(path: Path) -> None:
    """Give a file the mode that any new file gets; safetensors' own writer leaves it private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def lock_folder(folder: Path, service: str) -> int:
    """Hold a state folder for this process alone; returns the descriptor that holds it.

    The lock goes with the process, however that ends. Raises InvalidInput when another one has it.
    """
    # What a service keeps is nobody else's business.
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    handle = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InvalidInput(
            f"--state {folder} is in use by another {service}: stop that one, or use another folder"
        ) from None
    return handle


def when_there_is_room(
    write: Callable[[], T],
    folder: Path,
    on_wait: Callable[[str], None] = lambda reason: None,
    go_on: Callable[[], bool] = lambda: True,
) -> T:
    """Call `write`, again and again while the disk is full; `write` must be safe to repeat.

    `on_wait` hears why it waits, and an empty string once it is over. Every other error, and the
    full disk's own once `go_on` says no, is raised.
    """
    said = -_ROOM_LOG_SECONDS
    while True:
        try:
            result = write()
        except OSError as error:
            if error.errno not in _NO_ROOM or not go_on():
                raise
            reason = f"no room on disk for {folder}: free some, training goes on by itself"
            on_wait(reason)
            if time.monotonic() - said >= _ROOM_LOG_SECONDS:
                said = time.monotonic()
                log.error("%s (%s)", reason, error.strerror)
            time.sleep(_ROOM_PAUSE_SECONDS)
        else:
            if said > 0:
                on_wait("")
                log.warning("there is room on disk for %s again", folder)
            return result


def check_output_folder(output: Path) -> None:
    """Raises InvalidInput for an `--output` that is a file."""
    if output.exists() and not output.is_dir():
        raise InvalidInput(f"--output {output} must be a folder, but it is a file")
