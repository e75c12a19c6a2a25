"""What is taken for the answer of a text, by tables made by hand."""

from fractions import Fraction

import pytest

from lesft_client.data.answer_values import boxed, last_number, number_value, same_answer
from lesft_client.evaluation.extraction import choice_letter, read_answer

CHOICES = {"A": "bank", "B": "department store", "C": "$78.20", "D": "a dog", "E": "None of these"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs $1,080.50.", "1080.50"),
        ("€ 1,234", "1234"),
        ("£5 in all", "5"),
        ("She has 1,234,567 shells", "1234567"),
        ("1{,}234 or 1\\,234", "1234"),
        ("1\u202f234 km", "1234"),
        ("minus: -5", "-5"),
        ("minus: \N{MINUS SIGN}5", "-5"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("x=-5", "-5"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("pages 10\N{EN DASH}15", "15"),
        ("(3)-5", "5"),
        ("The answer is 18.", "18"),
        ("The answer is 18.\n\n", "18"),
        ("**18**", "18"),
        ("18 apples", "18"),
        ("18km", "18"),
        ("20%", "20"),
        ("\\(18\\%\\)", "18"),
        ("First 3, then 4, so 3 + 4 = 7", "7"),
        ("1,2,3", "3"),
        ("18.00", "18.00"),
        (".5", "0.5"),
        ("so it is ...5", "5"),
        ("Rs.18", "18"),
        ("3/4 of them", "3/4"),
        ("48/2", "48/2"),
        ("48/2 = 24", "24"),
        ("\\frac{3}{4}", "3/4"),
        ("$12/hour", "12"),
        ("24 cm^2", "24"),
        ("24 cm^{2}", "24"),
        ("24 m2 of CO2", "24"),
        ("5/0", None),
        ("9" * 5000, None),
        ("It is 7, then " + "9" * 5000, "7"),
        ("no number at all", None),
        ("", None),
        ("$", None),
        ("-", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("18.00", Fraction(18)),
        ("18.", Fraction(18)),
        ("-$1,080.50 in all", Fraction("-1080.5")),
        ("\N{MINUS SIGN}5", Fraction(-5)),
        ("1/2", Fraction(1, 2)),
        ("12.5/3", Fraction(25, 6)),
        ("20%", Fraction(20)),
        ("**18**", Fraction(18)),
        ("<18>", Fraction(18)),
        ("$\\frac{1}{2}$", Fraction(1, 2)),
        ("0", Fraction(0)),
        ("3:15", None),
        ("2024-05-01", None),
        ("1.2.3", None),
        ("5/0", None),
        ("about 18", None),
        ("B", None),
        ("", None),
    ],
)
def test_the_value_of_an_answer(answer: str, value: Fraction | None) -> None:
    assert number_value(answer) == value


@pytest.mark.parametrize(
    ("text", "strict", "boxed_", "flexible", "lenient"),
    [
        ("2 + 2 = 4\n#### 4", "4", None, "4", "4"),
        ("#### 3\nNo, wait.\n#### 1,204 apples\nThat took 2 steps.", "1204", None, "2", "1204"),
        ("#### $18.00", "18.00", None, "18.00", "18.00"),
        ("####18", "18", None, "18", "18"),
        ("#### **18**", "18", None, "18", "18"),
        ("#### <18>", "18", None, "18", "18"),
        ("#### \N{MINUS SIGN}5", "-5", None, "-5", "-5"),
        ("#### \\boxed{18}", "18", "18", "18", "18"),
        ("#### Mei has 18 shells", "Mei has 18 shells", None, "18", "18"),
        ("So it is 18.\n####", None, None, "18", "18"),
        ("So it is \\boxed{18}, in 2 steps.", None, "18", "2", "18"),
        ("\\boxed{\\frac{3}{4}}", None, "3/4", "3/4", "3/4"),
        ("\\boxed{18\\text{ m}^{2}} 3", None, "18", "3", "18"),
        ("\\boxed{1} and \\boxed{x = 2}", None, "2", "2", "2"),
        ("\\boxed{18", None, None, "18", "18"),
        ("\\boxed{}", None, None, None, None),
        ("\\boxed{\\frac{\\sqrt{}}{}}", None, "\\frac{\\sqrt{}}{}", None, "\\frac{\\sqrt{}}{}"),
        ("#### 0", "0", None, "0", "0"),
        ("I do not know.", None, None, None, None),
        ("", None, None, None, None),
    ],
)
def test_the_four_readings_of_a_number(
    text: str, strict: str | None, boxed_: str | None, flexible: str | None, lenient: str | None
) -> None:
    assert read_answer(text, "strict", numeric=True) == strict
    assert read_answer(text, "boxed", numeric=True) == boxed_
    assert read_answer(text, "flexible", numeric=True) == flexible
    assert read_answer(text, "lenient", numeric=True) == lenient


@pytest.mark.parametrize(
    ("text", "strict", "boxed_", "flexible", "lenient"),
    [
        ("I think.\n#### Route 66.", "Route 66", None, "#### Route 66", "Route 66"),
        ("It is \\boxed{\\text{New York}}", None, "New York", "It is \\boxed{\\text{New York}}", 0),
        ("Let me see.\nParis.", None, None, "Paris", "Paris"),
        (" ", None, None, None, None),
    ],
)
def test_the_four_readings_of_words(
    text: str, strict: str | None, boxed_: str | None, flexible: str | None, lenient: str | None
) -> None:
    assert read_answer(text, "strict", numeric=False) == strict
    assert read_answer(text, "boxed", numeric=False) == boxed_
    assert read_answer(text, "flexible", numeric=False) == flexible
    assert read_answer(text, "lenient", numeric=False) == (boxed_ if lenient == 0 else lenient)


@pytest.mark.parametrize(
    ("extracted", "expected", "same"),
    [
        ("18.00", "18", True),
        ("18", "18.0", True),
        ("1080.5", "$1,080.50", True),
        ("1/2", "0.5", True),
        ("0.333", "1/3", False),
        ("-5", "5", False),
        ("180", "18", False),
        ("18 apples", "18", True),
        ("eighteen", "18", False),
        (None, "18", False),
        (None, "", False),
        ("New york.", "new York", True),
        ("York", "New York", False),
        ("3:15", "3:15", True),
        ("3:15", "3:16", False),
    ],
)
def test_answers_are_compared_by_value(extracted: str | None, expected: str, same: bool) -> None:
    assert same_answer(extracted, expected) == same


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{a{b{c}}d}", "a{b{c}}d"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("}} \\boxed {7} }}", "7"),
        ("none", ""),
    ],
)
def test_a_box_may_hold_braces(text: str, inside: str) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("I think.\n#### B", "B"),
        ("#### b", "B"),
        ("#### (B)", "B"),
        ("#### **B**", "B"),
        ("#### <B>", "B"),
        ("#### B) department store", "B"),
        ("#### Department store.", "B"),
        ("#### a dog", "D"),
        ("#### A\nNo.\n#### C", "C"),
        ("The answer is A.\n#### C", "C"),
        ("#### \\boxed{B}", "B"),
        ("The answer is B", "B"),
        ("the answer is b", "B"),
        ("The answer is (b).", "B"),
        ("The correct option is: (C)", "C"),
        ("The correct choice would be option D.", "D"),
        ("Answer: **B**", "B"),
        ("Answer:\nB", "B"),
        ("So the best answer to this question is E, as the others fail.", "E"),
        ("The answer is A. Sorry, the answer is B.", "B"),
        ("The answer is \\boxed{\\text{B}}", "B"),
        ("10 rolls ANS:D", "D"),
        ("= 438\nanswer.A", "A"),
        ("So 40 sales\nD is the correct choice", "D"),
        ("(C) is right, since A fails.", "C"),
        ("A is wrong", None),
        ("I gave the answer. Always check.", None),
        ("Hence $\\boxed{\\text{(B)}}$.", "B"),
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        (" B) department store", "B"),
        ("B. department store", "B"),
        ("It must be (B), since a bank is none.", "B"),
        ("A) is wrong.\nB) is right.", "B"),
        ("A) is one way.\nB) is another.", None),
        ("I gave the answer. A dog it is.", None),
        ("A) bank\nB) department store\nC) $78.20", None),
        ("Because Banks Are Everywhere", None),
        ("The answer is a bank", None),
        ("The answer is Always", None),
        ("The answer is not here.", None),
        ("A bank is safe", None),
        ("Vitamin C is good", None),
        ("The answer is Z.", None),
        ("(F)", None),
        ("#### 5", None),
        ("I don't know", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_decides_on(text: str, letter: str | None) -> None:
    assert choice_letter(text, CHOICES) == letter


def test_only_letters_that_are_choices_count() -> None:
    assert choice_letter("Plan C (B): the answer is D.", {"A": "x", "B": "y"}) == "B"
