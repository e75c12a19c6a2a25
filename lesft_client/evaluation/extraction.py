"""The answer in a text that a model wrote: numbers, words and choice letters, as pure functions."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from lesft_client.data.answer_values import (
    AROUND_AN_ANSWER,
    boxed,
    last_number,
    leading_number,
    number_value,
)
from lesft_client.data.answers import MARK, final_answer, plain_answer

Reading = Literal["lenient", "strict", "flexible", "boxed"]
READINGS: tuple[Reading, ...] = ("lenient", "strict", "flexible", "boxed")
"""Every way to read an answer that is no choice."""

# A small letter counts only where no word follows: "a" is one.
_LETTER = (
    r"([A-Z](?![\w'\N{RIGHT SINGLE QUOTATION MARK}])|[a-z](?=[)\]}*_.,:;\"'$]|[ \t]*(?:\n|$)))"
)
_FIRST_LETTER = re.compile(_LETTER)
_NAMED_LETTER = re.compile(
    r"(?i:\b(?:answer|ans|option|choice)s?\b"
    r"(?:[ \t*_]+(?:is|was|be|will|would|should|must|therefore|the|correct|right|best|option|"
    r"choice|letter|answer|to|this|question)\b)*)"
    rf"(?:\.(?=[A-Z]))?[ \t:=*_`(\[{{\"'$]*(?:\\boxed\{{)?(?:\\text\{{)?\(?{_LETTER}"
)
_LETTER_THAT_IS = re.compile(
    r"(?<![\w'])([A-Z])\)?[*_]* is (?:the |thus |therefore )*(?:correct|right|best|answer)\b"
)
_LETTER_IN_PARENTHESES = re.compile(r"\(([A-Za-z])\)")
_LETTER_BEFORE_A_LINE = re.compile(r"[ \t*_`\"']*\(?(?:([A-Za-z])\)|([A-Z])[.:](?!\w))")
_LETTER_ALONE = re.compile(r"[ \t*_`\"']*\(?([A-Za-z])\)?[*_`\"'. \t]*")


# ---------------------------------------------------------------------- numbers and words


def read_answer(text: str, reading: Reading, numeric: bool) -> str | None:
    r"""What a text gives as its answer, a number in plain form (`1080.50`, `-5`, `3/4`) or words.

    - `strict`: what the last `#### ...` line says;
    - `boxed`: what stands in the last closed `\boxed{...}`, its last number where one is expected;
    - `flexible`: the last number anywhere or, where words are expected, the last line;
    - `lenient`: strict, else boxed, else the last number of the `####` line, else flexible; where
      a number is expected, the first of them that is one.

    None where there is no such thing.
    """
    if reading == "strict":
        return (_number_or_words if numeric else _words)(final_answer(text)) or None
    if reading == "boxed":
        inside = boxed(text)
        return (last_number(inside) if numeric else None) or plain_answer(inside) or None
    if reading == "flexible":
        return last_number(text) if numeric else plain_answer(_last_line(text)) or None
    candidates = [
        read_answer(text, "strict", numeric),
        read_answer(text, "boxed", numeric),
        last_number(final_answer(text)) if numeric else None,
        read_answer(text, "flexible", numeric),
    ]
    found = [candidate for candidate in candidates if candidate is not None]
    numbers = [candidate for candidate in found if number_value(candidate) is not None]
    return next(iter(numbers if numeric else found), None) or next(iter(found), None)


def _number_or_words(answer: str) -> str:
    if number := leading_number(answer):
        return number
    inside = boxed(answer)
    return _number_or_words(inside) if inside else answer


def _words(answer: str) -> str:
    return plain_answer(boxed(answer)) or answer


# ---------------------------------------------------------------------- letters


def choice_letter(text: str, choices: Mapping[str, str]) -> str | None:
    r"""The letter of the choice that a text decides on; None where it names none or wavers.

    `choices` has each choice's text by its capital letter. Read are, in this order: the last
    `#### ...` line, by letter or by the choice's own words; the last "answer is B" or its like; the
    last "B is correct" or its like; the last `\boxed{B}`; the last line, when it is a letter alone;
    and letters in parentheses (`(B)`) or before a line (`B)`, `B.`), when all of them are the same:
    a text that goes through the choices one by one names none.
    """
    for letters in (
        _letters_of_the_mark(text, choices),
        _NAMED_LETTER.findall(text),
        _LETTER_THAT_IS.findall(text),
        _first_letter(boxed(text)),
        _groups(_LETTER_ALONE.fullmatch(_last_line(text))),
    ):
        known = [letter.upper() for letter in letters if letter.upper() in choices]
        if known:
            return known[-1]
    matches = [_LETTER_BEFORE_A_LINE.match(line) for line in text.split("\n")]
    before_lines = [letter for match in matches for letter in _groups(match)]
    found = {letter.upper() for letter in (*before_lines, *_LETTER_IN_PARENTHESES.findall(text))}
    known = [letter for letter in found if letter in choices]
    return known[0] if len(known) == 1 else None


def _letters_of_the_mark(text: str, choices: Mapping[str, str]) -> Iterable[str]:
    if MARK not in text:
        return ()
    answer = final_answer(text).strip(AROUND_AN_ANSWER + "()[].")
    by_words = [
        letter
        for letter, words in choices.items()
        if plain_answer(words).casefold() == answer.casefold() != letter.casefold()
    ]
    return by_words if len(by_words) == 1 else _first_letter(answer)


def _first_letter(answer: str) -> Iterable[str]:
    return _groups(_FIRST_LETTER.match(answer.strip(AROUND_AN_ANSWER + "()[].")))


def _groups(match: re.Match[str] | None) -> list[str]:
    return [group for group in match.groups() if group] if match else []


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]
