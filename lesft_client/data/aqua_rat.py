"""AQuA-RAT (https://github.com/google-deepmind/AQuA): algebra with options and a rationale."""

import re
from collections.abc import Iterable
from itertools import takewhile

from lesft.errors import DataError
from lesft_client.data.answers import with_final_line
from lesft_client.data.prompts import base_prompt, choice_line, reference_prompt, with_choices
from lesft_client.data.rows import Row
from lesft_client.data.samples import Sample

_OPTION = re.compile(r"\s*\(?([A-Z])\s*\)(.*)", re.DOTALL)
_WORD = re.compile(r"[^\W_]+")
_LETTERS = frozenset("ABCDE")
_NAMES_THE_ANSWER = frozenset(["answer", "ans", "option", "choice", "correct"])
_AROUND_THE_ANSWER = _NAMES_THE_ANSWER | frozenset(
    ["so", "thus", "hence", "therefore", "and", "the", "our", "final", "right", "is", "will", "be"]
)
_MOST_WORDS_OF_AN_OPTION = 3


def samples(rows: Iterable[Row]) -> list[Sample]:
    """The rows as samples: the target is the rationale, then the letter; x̃ shows only the answer.

    A question without a rationale gets a target made of the answer alone.
    """
    return [_sample(row) for row in rows]


def _sample(row: Row) -> Sample:
    right = row.text("correct")
    choices = _choices(row, right)
    question = with_choices(row.text("question"), choices)
    rationale = without_answer(str(row.fields.get("rationale") or ""))
    return Sample(
        prompt=base_prompt(question, "letter of the right choice"),
        target=with_final_line(rationale or f"The answer is {choices[right]}.", right),
        reference=reference_prompt(question, choice_line(right, choices)),
        answer=right,
    )


def _choices(row: Row, right: str) -> dict[str, str]:
    options = row.fields.get("options")
    found = options if isinstance(options, list) else [options]
    matches = [_OPTION.fullmatch(str(option)) for option in found]
    if not all(matches):
        raise DataError(f'{row.where}: "options" must be a list of "A)...", "B)..." and so on')
    pairs = [(match[1], match[2].strip()) for match in matches if match]
    return row.choices([letter for letter, _ in pairs], [text for _, text in pairs], right)


def without_answer(rationale: str) -> str:
    """The rationale without what stands at its end only to name the answer.

    That is written in a hundred ways ("Answer : A", "ANSWER:A", "so the correct option is A.",
    "Answer: D) 109 rolls", "A"), on a line of its own or behind the last sentence.
    """
    head, line_end, line = rationale.strip().rpartition("\n")
    return f"{head}{line_end}{_without_answer_words(line)}".rstrip()


def _without_answer_words(line: str) -> str:
    words = [match[0] for match in _WORD.finditer(line)]
    leading = list(takewhile(_is_answer_word, words))
    if _names_the_answer(leading) and len(words) - len(leading) <= _MOST_WORDS_OF_AN_OPTION:
        return ""
    trailing = list(takewhile(_is_answer_word, reversed(words)))
    if len(trailing) == len(words) and _LETTERS.intersection(words):
        return ""
    if _names_the_answer(trailing):
        start = list(_WORD.finditer(line))[-len(trailing)].start()
        return line[:start].rstrip(" (=>,:-\N{EN DASH}\N{THEREFORE}")
    return line


def _is_answer_word(word: str) -> bool:
    return word in _LETTERS or word.lower() in _AROUND_THE_ANSWER


def _names_the_answer(words: list[str]) -> bool:
    names_it = any(word.lower() in _NAMES_THE_ANSWER for word in words)
    return names_it and not _LETTERS.isdisjoint(words)
