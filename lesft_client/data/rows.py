"""Rows of data before they are samples, each knowing where it came from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesft.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row: its fields, and where they stand, such as `train.jsonl:17`, for messages.

    Messages name the place and the field, never the text in it: it may be private.
    """

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """The string in a field, stripped. Raises DataError where there is none or it is blank."""
        if name not in self.fields:
            found = ", ".join(self.fields) or "none"
            raise DataError(f'{self.where}: needs the field "{name}"; its fields are: {found}')
        value = self.fields[name]
        if not isinstance(value, str):
            raise DataError(f'{self.where}: "{name}" must be a string, got {type(value).__name__}')
        if not value.strip():
            raise DataError(f'{self.where}: "{name}" must not be empty; fill it or drop the row')
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise DataError(
                f'{self.where}: "{name}" holds half a surrogate pair, such as \\ud83d, which is no '
                "character; write the text as UTF-8"
            )
        return value.strip()

    def choices(self, letters: list[str], texts: list[str], right: str) -> dict[str, str]:
        """Lettered choices, once they are known to be distinct and to include the right one."""
        if right not in letters or len(set(letters)) != len(letters):
            raise DataError(
                f"{self.where}: the right answer {right!r} must be one of distinct choices, "
                f"got {', '.join(letters) or 'none'}"
            )
        return dict(zip(letters, texts, strict=True))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file in UTF-8: one JSON object a line; blank lines are ignored.

    Lines end at a line feed only: texts may hold other line separators of Unicode unescaped.
    Raises DataError, with file and line, when the file or a line cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row(f"{path}:{number}", line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _row(where: str, line: bytes) -> Row:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1}); "
            "save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: is not JSON: {error.msg} (column {error.colno}); a line is one JSON object"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: is not JSON: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{where}: holds a number of too many digits") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: must be a JSON object, got {type(fields).__name__}")
    return Row(where, fields)
