"""What a log line looks like, and what it is about."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from contextvars import ContextVar
from typing import Any

import pytest

from lesft import logs
from lesft.logs import JsonFormatter, note, note_process


@pytest.fixture(autouse=True)
def own_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_process", {})
    monkeypatch.setattr(logs, "_task", ContextVar("task"))


def record(message: str, *arguments: object, **options: Any) -> logging.LogRecord:
    return logging.LogRecord(
        "lesft_server.run",
        logging.WARNING,
        "run.py",
        1,
        message,
        arguments,
        **{"exc_info": None} | options,
    )


def line(message: str, *arguments: object, **options: Any) -> dict[str, Any]:
    text = JsonFormatter().format(record(message, *arguments, **options))
    assert "\n" not in text
    fields: dict[str, Any] = json.loads(text)
    return fields


def test_a_json_line_says_when_who_and_what() -> None:
    written = record("client %s\nis away", "a\u2028b")
    written.created = 1_700_000_000.25
    text = JsonFormatter().format(written)
    assert text.isascii()
    assert text.count("\n") == 0
    assert json.loads(text) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "lesft_server.run",
        "message": "client a\u2028b\nis away",
    }


def test_an_exception_is_a_field_with_its_traceback() -> None:
    try:
        raise ValueError("what went wrong")
    except ValueError:
        fields = line("it failed", exc_info=sys.exc_info())
    assert fields["message"] == "it failed"
    assert fields["exception"].startswith("Traceback (most recent call last):\n")
    assert fields["exception"].endswith("ValueError: what went wrong")


def test_what_a_process_is_about_is_in_all_its_lines_and_a_task_s_in_its_own() -> None:
    note_process(service="lesft-server", run="run-7")

    async def client(name: str, round_index: int) -> dict[str, Any]:
        note(client=name)
        await asyncio.sleep(0)
        note(round=round_index)

        async def step() -> dict[str, Any]:
            note(client=None)
            return line("step")

        assert await asyncio.create_task(step()) == about(round=round_index, message="step")
        return line("here")

    def about(**fields: object) -> dict[str, Any]:
        of_all = {"level": "warning", "logger": "lesft_server.run"}
        return {**of_all, "service": "lesft-server", "run": "run-7", "time": ANY_TIME, **fields}

    async def both() -> list[dict[str, Any]]:
        return await asyncio.gather(client("a", 1), client("b", 2))

    a, b = asyncio.run(both())
    assert a == about(client="a", round=1, message="here")
    assert b == about(client="b", round=2, message="here")
    assert line("after") == about(message="after")


class AnyTime:
    """Equals every RFC 3339 time in UTC."""

    def __eq__(self, other: object) -> bool:
        return bool(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(other)))

    __hash__ = None  # type: ignore[assignment]


ANY_TIME = AnyTime()

PROGRAM = """
import logging, sys
from lesft.logs import LogSettings, configure_logs
configure_logs(LogSettings(log_level="error"), "lesft-test", "%(message)s")
settings = LogSettings(log_format=sys.argv[1], log_level=sys.argv[2])
configure_logs(settings, "lesft-test", "> %(message)s")
for name in ("lesft_server.run", "somebody.elses"):
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger(name), level)("%s of %s", level, name)
heard = []
class Page(logging.Handler):
    def emit(self, record): heard.append(record.getMessage())
logging.getLogger("lesft_server").addHandler(Page())
logging.getLogger("lesft_server.run").info("for the page")
print(heard)
"""


def logged(log_format: str, log_level: str) -> list[str]:
    """What a process with these settings writes to standard error."""
    command = [sys.executable, "-c", PROGRAM, log_format, log_level]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    # Whatever is printed, the live page hears of events.
    assert done.stdout == "['for the page']\n"
    return [line for line in done.stderr.splitlines() if "for the page" not in line]


def test_the_level_is_of_our_own_modules_and_libraries_never_debug() -> None:
    assert logged("text", "debug") == [
        "> debug of lesft_server.run",
        "> info of lesft_server.run",
        "> warning of lesft_server.run",
        "> info of somebody.elses",
        "> warning of somebody.elses",
    ]
    assert logged("text", "warning") == [
        "> warning of lesft_server.run",
        "> warning of somebody.elses",
    ]


def test_json_lines_are_one_object_each() -> None:
    lines = [json.loads(line) for line in logged("json", "info")]
    assert [
        (line["level"], line["logger"], line["message"], line["service"]) for line in lines
    ] == [
        ("info", "lesft_server.run", "info of lesft_server.run", "lesft-test"),
        ("warning", "lesft_server.run", "warning of lesft_server.run", "lesft-test"),
        ("info", "somebody.elses", "info of somebody.elses", "lesft-test"),
        ("warning", "somebody.elses", "warning of somebody.elses", "lesft-test"),
    ]
