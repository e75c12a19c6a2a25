r"""Whether a teacher's answer may be learned from: whole, with its working, and right.

Strict, because a wrong reading teaches nonsense while a right answer not read costs one more try.
The final answer is
- what the last `####` says, when it ends the text, or stands on its line with nothing else (what
  follows is then cut off);
- or else what the last line says by `\boxed{18}`, `The answer is 18.` or `Answer: 18`.
Behind a number only a unit of a few words without digits may follow: `5 or 6` is no answer, nor is
`1,8`, which may mean 1.8. Any other number in the text counts for nothing, even the right one, and
so does what an earlier sentence says against the final answer.
"""

import re
from dataclasses import dataclass
from typing import Literal

from lesft_client.data.answer_values import boxes, is_number, same_answer, without_text_commands
from lesft_client.data.answers import MARK, plain_answer, with_final_line

Fault = Literal["wrong", "unclear", "cut off", "empty", "no working", "refused"]
"""Why an answer is not kept: it is wrong, names no final answer, was not finished, holds no text,
is the final answer alone, or the teacher would not take the question."""

_FINISHED = ("stop", "eos", None)
_MOST_UNIT_WORDS = 4

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_WRITTEN_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_BARE_ANSWER = re.compile(r"[$€£]?\s*-?[$€£]?\d[\d,]*(?:\.\d+)?[.%]?|\(?[A-Z][).]?")
_SEVERAL_NUMBERS = re.compile(r"[$€£]?\s*-?[$€£]?\d+(?:\.\d+)?(?:,\d|[^/:-].*\d)")
_GROUPED_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_PHRASE = re.compile(r".*\banswer(?:\s+is\b\s*:?|\s*[:=])\s*", re.IGNORECASE | re.DOTALL)
_CLOSING_LINE = re.compile(r"\s*(?:\\\]|\\\)|\$\$?|\*\*|`+)?\s*")
_DECORATION = re.compile(r"\*\*|`|\\[()\[\],!;]|(?<=\d)\$|\$(?=[A-Z(\\])|(?<=[A-Z)])\$")
_END_OF_THOUGHTS = "</think>"


@dataclass(frozen=True)
class Verdict:
    """The target to learn, or the fault for which there is none."""

    target: str = ""
    fault: Fault | None = None


def judge(text: str, finish_reason: str | None, answer: str) -> Verdict:
    """What comes of a teacher's text for a question whose right answer is `answer`.

    The target is the text without what it thought in `<think>`, and ends in the data set's answer
    as its `####` line.
    """
    if finish_reason not in _FINISHED:
        return Verdict(fault="cut off")
    said = text.rpartition(_END_OF_THOUGHTS)[2].strip()
    if said.startswith("<think>"):
        return Verdict(fault="cut off")
    if not said or any("\ud800" <= char <= "\udfff" for char in said):
        return Verdict(fault="empty")
    working, stated = _split(said)
    if not stated:
        return Verdict(fault="unclear")
    if not _is_right(stated, answer):
        unclear = is_number(answer) and _SEVERAL_NUMBERS.match(stated)
        return Verdict(fault="unclear" if unclear else "wrong")
    if not working:
        return Verdict(fault="no working")
    return Verdict(with_final_line(working, answer))


def _is_right(stated: str, right: str) -> bool:
    """`same_answer`, but what is no number as a whole must be the same text whatever its case."""
    if _NUMBER.fullmatch(stated) and _NUMBER.fullmatch(right):
        return same_answer(stated, right)
    return stated.casefold() == right.casefold()


def _split(text: str) -> tuple[str, str]:
    """The working, and the final answer in plain form; that is empty where none is clear."""
    before, mark, after = text.rpartition(MARK)
    line, _, rest = after.strip().partition("\n")
    if mark and (not rest.strip() or _BARE_ANSWER.fullmatch(_undecorated(line))):
        above, _, opening = before.rpartition("\n")
        return (before if opening.strip("*_# \t") else above).rstrip(), _read(line)
    last = _last_line(text)
    if boxed := boxes(last):
        return text, _one_answer(_undecorated(boxed[-1]))
    return text, _read(last) if _PHRASE.match(_undecorated(last)) else ""


def _last_line(text: str) -> str:
    """The last line that is more than the end of a formula or of bold type."""
    lines = text.split("\n")
    return next((line for line in reversed(lines) if not _CLOSING_LINE.fullmatch(line)), "")


def _read(line: str) -> str:
    """The one answer in a line, with or without `The answer is` before it."""
    boxed = boxes(line)
    plain = _undecorated(boxed[-1] if boxed else line)
    phrase = _PHRASE.match(plain)
    return _one_answer(plain[phrase.end() :] if phrase else plain)


def _undecorated(text: str) -> str:
    """The text without Markdown and LaTeX around numbers and letters."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    text = text.replace("\\$", "$").replace("\\%", "%")
    return _DECORATION.sub("", without_text_commands(text)).strip(" \t_")


def _one_answer(text: str) -> str:
    plain = plain_answer(text)
    if not _NUMBER.fullmatch(plain):
        return plain
    number = _WRITTEN_NUMBER.search(text)
    assert number, f"plain_answer found a number where there is none: {plain}"
    behind = text[number.end() :]
    clear = not re.search(r"\d", behind) and len(behind.split()) <= _MOST_UNIT_WORDS
    return plain if clear and _GROUPED_NUMBER.fullmatch(number[0].rstrip(",")) else ""
