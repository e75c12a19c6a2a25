"""The wording of the base prompt x and of the reference prompt x̃ (METHOD section 2)."""

from typing import Literal

from lesft_client.data.answers import MARK, plain_answer

AnswerKind = Literal["number", "letter of the right choice"]

_CONSULT = (
    "Consult the standard answer to the following question, then give your own answer to it "
    "step by step.\n\n"
)
_STANDARD_ANSWER = "\n\n### Standard answer:\n"


def base_prompt(question: str, kind: AnswerKind) -> str:
    """The user's message of the base path: solve this."""
    return (
        f"Solve the following problem step by step. End with a last line `{MARK} <{kind}>`.\n\n"
        f"{question}"
    )


def reference_prompt(question: str, standard_answer: str) -> str:
    """The user's message of the reference path: the same question with the ground truth."""
    return f"{_CONSULT}### Question:\n{question}{_STANDARD_ANSWER}{standard_answer}"


def with_solution(reference: str, answer: str, solution: str) -> str:
    """The reference prompt with a worked solution where it showed the answer alone.

    A prompt that shows more than the answer, or is not worded by `reference_prompt`, stays as it
    is.
    """
    head, _, shown = reference.rpartition(_STANDARD_ANSWER)
    answer_alone = "\n" not in shown and MARK not in shown and plain_answer(shown) == answer
    if not head.startswith(_CONSULT) or not answer_alone:
        return reference
    return f"{head}{_STANDARD_ANSWER}{solution}"


def with_choices(question: str, choices: dict[str, str]) -> str:
    """The question, and under it one lettered choice a line."""
    return "\n".join([question, *(choice_line(letter, choices) for letter in choices)])


def choice_line(letter: str, choices: dict[str, str]) -> str:
    """One choice with its letter: `B) populated areas`."""
    return f"{letter}) {choices[letter]}"
