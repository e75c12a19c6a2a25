"""What the teacher's HTTP replies mean: an answer, try again, give the question up, or stop."""

import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from lesft.errors import one_line

_TRY_AGAIN = frozenset([408, 425, 429])
_QUESTION_REFUSED = ("context_length", "context length", "content_filter", "content management")
"""What services say in a status of 4xx when the one question is too long or not to their liking."""

_LONGEST_QUOTE = 300
_TELLING_LINE = 12
"""Lines of the question from this length are taken out of what the teacher says about it."""


@dataclass(frozen=True)
class Completion:
    """An answer of the teacher, and what it cost in tokens; zeros where the teacher does not say.

    `refused` means that it did not take this question, for its length or its content.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: bool = False


class TryAgain(Exception):
    """A request failed in a way that may pass.

    `after_seconds` is how long the teacher asked to be left alone, if it did.
    """

    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


def read_completion(response: httpx.Response) -> Completion:
    """The answer in a reply of status 200; without text where it has no choices.

    Raises TryAgain when it is no chat completion at all: something else answered.
    """
    try:
        body = response.json()
    except ValueError:
        raise TryAgain("answers with something that is not JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        raise TryAgain("answers with something that is no chat completion")
    usage = body.get("usage")
    choice = body["choices"][0] if body["choices"] else None
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    reason = choice.get("finish_reason") if isinstance(choice, dict) else None
    return Completion(
        content if isinstance(content, str) else "",
        reason if reason is None else str(reason),
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
    )


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def may_pass(status: int) -> bool:
    """Whether a request with this status is worth repeating."""
    return status in _TRY_AGAIN or status >= 500


def is_refused_question(response: httpx.Response) -> bool:
    """Whether a status of 4xx is about this one question, so that others may be taken."""
    said = " ".join(_messages(response)).lower()
    return response.status_code in (400, 413, 422) and any(
        sign in said for sign in _QUESTION_REFUSED
    )


def quoted(response: httpx.Response, private: list[str]) -> str:
    """What the teacher says of an error, on one line without the texts in `private`.

    Only strings that are meant as messages are quoted: services repeat requests in other places.
    """
    said = next(iter(_messages(response)), "")
    for text in private:
        for line in [text, *(line for line in text.split("\n") if len(line) >= _TELLING_LINE)]:
            said = said.replace(line, "…") if line else said
    said = one_line(said)
    return said if len(said) <= _LONGEST_QUOTE else said[:_LONGEST_QUOTE] + "…"


def _messages(response: httpx.Response) -> list[str]:
    try:
        body = response.json()
    except ValueError:
        return []
    if not isinstance(body, dict):
        return []
    error = body.get("error")
    places = [error, body] if isinstance(error, dict) else [{"message": error}, body]
    found = [place.get(name) for place in places for name in ("message", "detail", "code")]
    return [text for text in found if isinstance(text, str) and text]


def retry_after_seconds(response: httpx.Response) -> float | None:
    """What a Retry-After header asks for (RFC 9110 section 10.2.3): seconds, or a date.

    A date is measured from the reply's own Date, so that clocks need not agree. None where the
    header is missing or means nothing.
    """
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        until = _timestamp(value)
        since = _timestamp(response.headers.get("date", "")) or time.time()
        return None if until is None else max(0.0, until - since)
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _timestamp(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
