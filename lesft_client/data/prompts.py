"""The wording of the base prompt x and of the reference prompt x̃ (METHOD section 2)."""

from typing import Literal

from lesft_client.data.answers import MARK

AnswerKind = Literal["number", "letter of the right choice"]


def base_prompt(question: str, kind: AnswerKind) -> str:
    """The user's message of the base path: solve this."""
    return (
        f"Solve the following problem step by step. End with a last line `{MARK} <{kind}>`.\n\n"
        f"{question}"
    )


def reference_prompt(question: str, standard_answer: str) -> str:
    """The user's message of the reference path: the same question with the ground truth."""
    return (
        "Consult the standard answer to the following question, then give your own answer to it "
        "step by step.\n\n"
        f"### Question:\n{question}\n\n"
        f"### Standard answer:\n{standard_answer}"
    )


def with_choices(question: str, choices: dict[str, str]) -> str:
    """The question, and under it one lettered choice a line."""
    return "\n".join([question, *(choice_line(letter, choices) for letter in choices)])


def choice_line(letter: str, choices: dict[str, str]) -> str:
    """One choice with its letter: `B) populated areas`."""
    return f"{letter}) {choices[letter]}"
