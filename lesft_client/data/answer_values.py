"""Numbers and boxes in the text of an answer, and whether two answers are the same.

Numbers are compared by value: `$1,080.50`, `1080.5` and `2161/2` are the same answer.
"""

import re
from fractions import Fraction

from lesft_client.data.answers import plain_answer

_MOST_DIGITS = 100
"""A longer number is a model that repeats itself, and no answer."""

_NUMBER = re.compile(
    r"""
    (?<![\w^])(?<!\^\{)(?<!\d[.:])              # no part of a word, exponent, number or time
    (?P<sign>(?<![)\]}%])[-\N{MINUS SIGN}\N{EN DASH}])?
    (?:[$€£¥₹]\s?(?P<inner_sign>[-\N{MINUS SIGN}])?)?
    (?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ | (?<!\.)(?=\.[0-9]))
    (?P<decimals>\.[0-9]+)?
    (?:/(?P<below>[0-9]+(?:\.[0-9]+)?)(?![/0-9]))?
    """,
    re.VERBOSE,
)
_GOES_ON = re.compile(r"[:/\-\N{EN DASH}.]\d")
"""Behind a number, this makes it a time, a date, a range or a version."""

_BOX = re.compile(r"\\boxed\s*\{")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_LATEX_AROUND = re.compile(r"\\[()\[\]]|\\(?=[$%#])")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
AROUND_AN_ANSWER = " \t*_`<>\"'=:"


def same_answer(extracted: str | None, expected: str) -> bool:
    """Whether they are the same number or, where `expected` is none, the same words.

    Words are compared without regard to case, outer spaces and a final full stop.
    """
    if extracted is None:
        return False
    if is_number(expected):
        return number_value(extracted) == number_value(expected)
    return plain_answer(extracted).casefold() == plain_answer(expected).casefold()


def is_number(answer: str) -> bool:
    """Whether an answer is one number, with or without a unit; no date, range or address."""
    match = _match_at_the_start(answer)
    if match is None or _value(match) is None:
        return False
    return not any(character.isdigit() for character in match.string[match.end() :])


def number_value(answer: str) -> Fraction | None:
    """The value of an answer that begins with a number, such as `-$1,080.50 in all`.

    Percent signs and units are ignored: `20%` is 20. None where it begins with anything else, or
    with a time, a date or a range.
    """
    match = _match_at_the_start(answer)
    return _value(match) if match else None


def leading_number(answer: str) -> str | None:
    """The number that `number_value` takes, in plain form (`1080.50`, `-5`, `3/4`)."""
    match = _match_at_the_start(answer)
    return _written(match) if match and _value(match) is not None else None


def last_number(text: str) -> str | None:
    """The last number of a text, in plain form; None where there is none."""
    numbers = [match for match in _NUMBER.finditer(_plain(text)) if _value(match) is not None]
    return _written(numbers[-1]) if numbers else None


def boxed(text: str) -> str:
    r"""What stands in the last closed `\boxed{...}`, whatever braces are in it; empty for none."""
    inside, found = "", boxes(text)
    while found:
        inside = found[-1]
        found = boxes(inside)
    return without_text_commands(inside).strip()


def boxes(text: str) -> list[str]:
    r"""What stands in each closed `\boxed{...}`, as it is written; one in another is part of it."""
    insides: list[str] = []
    end = 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                insides.append(text[match.end() : place])
                end = place
                break
    return insides


def without_text_commands(text: str) -> str:
    r"""The text with `\text{words}` and its like replaced by the words."""
    return _LATEX_TEXT.sub(r"\1", text)


def _match_at_the_start(answer: str) -> re.Match[str] | None:
    plain = _plain(answer).lstrip(AROUND_AN_ANSWER)
    match = _NUMBER.match(plain)
    return None if match is None or _GOES_ON.match(plain, match.end()) else match


def _plain(text: str) -> str:
    """The text with LaTeX's ways to write a number undone."""
    text = _LATEX_FRACTION.sub(r"\1/\2", without_text_commands(text))
    return _THOUSANDS.sub(",", _LATEX_AROUND.sub("", text))


def _value(match: re.Match[str]) -> Fraction | None:
    written = _written(match)
    if len(written) > _MOST_DIGITS:
        return None
    above, _, below = written.partition("/")
    divisor = Fraction(below or 1)
    return Fraction(above) / divisor if divisor else None


def _written(match: re.Match[str]) -> str:
    sign = "-" if match["sign"] or match["inner_sign"] else ""
    digits = match["digits"].replace(",", "") or "0"
    below = f"/{match['below']}" if match["below"] else ""
    return f"{sign}{digits}{match['decimals'] or ''}{below}"
