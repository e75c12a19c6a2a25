"""The final line of a solution: `#### 18` or `#### B`."""

import re

MARK = "####"

_NUMBER = re.compile(
    r"""
    [$€£]?\s*(-?)[$€£]?
    ((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)
    (?![/:-] | [A-Z] | (?:st|nd|rd|th)\b)                  # no time, name or ordinal
    (?!\s*(?:hundred|thousand|(?:m|b|tr)illion|dozen)\b)
    [^\d]*                                                # a unit, but no other number
    """,
    re.ASCII | re.VERBOSE,
)
_LETTER = re.compile(r"\(?([A-Z])(?:[):]|\.?$)")


def with_final_line(solution: str, answer: str) -> str:
    """The solution, and under it its final answer."""
    return f"{solution}\n{MARK} {answer}"


def final_answer(text: str) -> str:
    """What the last `####` line says, as `plain_answer` writes it; empty where there is none."""
    _, mark, rest = text.rpartition(MARK)
    line = rest.strip().partition("\n")[0]
    return plain_answer(line) if mark else ""


def plain_answer(text: str) -> str:
    """An answer in the one form in which answers can be compared as strings.

    The one number that a text begins with stands alone and without commas (`$1,080 in all` is
    `1080`), a leading choice is its letter (`B) bank` is `B`); any other text, such as a date, a
    range or a name, loses its outer spaces and full stop.
    """
    text = text.strip()
    if number := _NUMBER.fullmatch(text):
        return number[1] + number[2].replace(",", "")
    if letter := _LETTER.match(text):
        return letter[1]
    return text.rstrip(".")
