"""A file that grows by a line for whatever a long command has done, so that it can go on later.

The first line says what decides the results; a run with other settings is not a continuation. A
last line that was not finished is dropped.
"""

import fcntl
import io
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lesft.errors import DataError, InvalidInput
from lesft.files import sync_folder

Conditions = Mapping[str, Any]
"""Everything that decides the results, by the name its user knows it under; values are JSON's."""


class Record(BaseModel):
    """What came of one question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    """Place of the question, from 0."""
    seconds: float = 0.0
    """Wall-clock time since the record before it, or since the command began."""


R = TypeVar("R", bound=Record)


class AppendFile(ABC, Generic[R]):
    """Records by their index, and the file that keeps them behind a header."""

    record_type: type[R]
    forced_to_disk: ClassVar[bool]
    """Whether a record is to survive a power cut, and not only the end of this process."""
    way_out: ClassVar[str]
    """What a user can do about a damaged file."""

    def __init__(self, path: Path, file: io.FileIO, header: Mapping[str, Any]) -> None:
        """`file` comes from `open_for_appending`."""
        self.path = path
        self._file = file
        self._header = json.dumps(dict(header)).encode() + b"\n"
        self._since = time.monotonic()
        self.by_index: dict[int, R] = {}

    @abstractmethod
    def difference(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
        """What two headers differ in, as the end of a message; empty where this run can go on.

        Raises ValueError, KeyError or TypeError when `theirs` is no header of this command.
        """

    def add(self, record: R) -> R:
        """Keep a record, with its seconds; it is in the file when this returns."""
        now = time.monotonic()
        record = record.model_copy(update={"seconds": round(now - self._since, 4)})
        self._write(record.model_dump_json().encode() + b"\n")
        self._since = now
        self.by_index[record.index] = record
        return record

    def read(self) -> None:
        """Take up what an earlier run left.

        Raises InvalidInput when that run had other settings, DataError for a damaged file.
        """
        self._file.seek(0)
        data = self._file.read()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        for number, line in enumerate(lines[1:], start=2):
            try:
                record = self.record_type.model_validate_json(line)
            except ValidationError:
                raise self._damaged(number) from None
            self.by_index[record.index] = record
        if self.by_index:
            self._compare(lines[0])
            self._file.truncate(sum(map(len, lines)))
        else:  # nothing is lost by beginning anew with other settings
            self.begin()

    def begin(self) -> None:
        """Drop what is there."""
        self._file.truncate(0)
        self._write(self._header)
        if self.forced_to_disk:
            sync_folder(self.path.parent)

    def _compare(self, header: bytes) -> None:
        try:
            difference = self.difference(json.loads(header), json.loads(self._header))
        except (ValueError, KeyError, TypeError):
            raise self._damaged(1) from None
        if difference:
            raise InvalidInput(f"{self.path} was begun with {difference}")

    def _damaged(self, line: int) -> DataError:
        return DataError(f"{self.path}:{line}: is not what this command writes; {self.way_out}")

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        if self.forced_to_disk:
            os.fsync(self._file.fileno())


@contextmanager
def open_for_appending(path: Path, command: str) -> Iterator[io.FileIO]:
    """The file at `path`, for this process alone. Raises InvalidInput when another one has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        assert isinstance(file, io.FileIO)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"{path} is in use by another lesft-client {command}: wait for that one, or use "
                "another --output"
            ) from None
        yield file


def differing_names(theirs: Conditions, ours: Conditions) -> list[str]:
    """The names under which two sets of conditions have different values."""
    return [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
