"""Guesses from the text so far, and when they are given up."""

import random
from collections.abc import Sequence

import pytest

from lesft_client.prompt_lookup import Guesser, next_tokens_by_lookup

REPEATING = [1, 2, 3, 4, 5, 1, 2, 3]
CHANCES = 12
"""So many chances to guess, until guessing that was not worth it is tried again."""


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        # The longest match goes first, although a shorter one came later.
        ([1, 2, 3, 9, 9, 0, 2, 3, 8, 8, 1, 2, 3], 2, [9, 9]),
        # Of equally long ones the latest.
        ([1, 2, 3, 7, 1, 2, 3, 8, 0, 1, 2, 3], 2, [8, 0]),
        ([4, 5, 7, 4, 5, 8, 4, 5], 1, [8]),
        # As many as are asked for, as far as the text goes.
        (REPEATING, 1, [4]),
        (REPEATING, 4, [4, 5, 1, 2]),
        (REPEATING, 50, [4, 5, 1, 2, 3]),
        (REPEATING, 0, []),
        # A match may overlap with what it is compared to.
        ([6, 6, 6], 5, [6]),
        ([6, 6, 6, 6, 6], 5, [6]),
        # One token is no match, and the end of a text does not match itself.
        ([5, 1, 2, 5], 5, []),
        ([1, 2, 3, 4, 5], 5, []),
        ([7, 7], 5, []),
        ([7], 5, []),
        ([], 5, []),
    ],
)
def test_what_followed_the_longest_and_latest_match_comes_next(
    text: list[int], most: int, expected: list[int]
) -> None:
    before = list(text)
    assert next_tokens_by_lookup(text, most) == expected
    assert next_tokens_by_lookup(tuple(text), most) == expected
    assert text == before


def test_lookup_finds_what_a_plain_search_finds() -> None:
    def plain(text: Sequence[int], most: int) -> list[int]:
        for length in (3, 2):
            found = [
                list(text[end : end + most])
                for end in range(length, len(text))
                if text[end - length : end] == text[len(text) - length :]
            ]
            if found:
                return found[-1]
        return []

    draw = random.Random(0)
    texts = [[draw.randrange(5) for _ in range(draw.randrange(25))] for _ in range(500)]
    got = [next_tokens_by_lookup(text, 4) for text in texts]
    assert got == [plain(text, 4) for text in texts]
    assert 100 < sum(map(bool, got)) < 450


# ---------------------------------------------------------------------- when to guess


def measured(plain: float, guess: float, right: int) -> Guesser:
    """A guesser that knows how long steps take and how many guesses are right."""
    guesser = Guesser(4)
    guesser.learn(0, 0, plain)
    guesser.learn(4, right, guess)
    return guesser


def guesses_in(guesser: Guesser, chances: int) -> list[bool]:
    """At which of so many chances it guesses."""
    return [bool(guesser.guesses(REPEATING, 4)) for _ in range(chances)]


def test_guesses_are_as_many_as_both_limits_allow() -> None:
    assert Guesser(4).guesses(REPEATING, 9) == [4, 5, 1, 2]
    assert Guesser(4).guesses(REPEATING, 3) == [4, 5, 1]
    assert Guesser(4).guesses(REPEATING, 0) == []
    assert Guesser(4).guesses(REPEATING, -1) == []
    assert Guesser(0).guesses(REPEATING, 9) == []
    assert Guesser(4).guesses([1, 2, 3], 9) == []


def test_guessing_goes_on_while_it_is_faster() -> None:
    # Three tokens for the time of 2.9 plain steps; three for the time of 3.1.
    assert all(guesses_in(measured(1.0, 2.9, right=2), 3 * CHANCES))
    assert not any(guesses_in(measured(1.0, 3.1, right=2), CHANCES - 1))


def test_guessing_that_is_not_worth_it_is_tried_again_after_a_while() -> None:
    guesser = measured(1.0, 3.0, right=0)
    turn = [False] * (CHANCES - 1) + [True]
    assert guesses_in(guesser, 3 * CHANCES) == turn * 3
    # A text that repeats nothing gives no chance to guess, and so none that is let pass.
    guesses_in(guesser, CHANCES - 1)
    assert [guesser.guesses([1, 2, 3], 4) for _ in range(5)] == [[]] * 5
    assert guesses_in(guesser, 2) == [True, False]


def test_guessing_comes_back_once_it_pays_and_goes_once_it_does_not() -> None:
    guesser = measured(1.0, 3.0, right=0)
    for _ in range(10):
        guesser.learn(4, 4, 3.0)
    assert all(guesses_in(guesser, 3 * CHANCES))
    for _ in range(10):
        guesser.learn(4, 0, 3.0)
    assert not any(guesses_in(guesser, CHANCES - 1))
    for _ in range(20):
        guesser.learn(0, 0, 9.0)  # the link has become slow: a guess costs nothing beside it
    assert all(guesses_in(guesser, 3 * CHANCES))


def test_guessing_stops_too_where_every_step_finds_something_to_guess() -> None:
    guesser = Guesser(8)
    text = [1, 2, 3, 4, 1, 2, 3]
    guessed = []
    for _ in range(24):
        guesses = guesser.guesses(text, 8)
        guessed.append(bool(guesses))
        guesser.learn(len(guesses), 0, 2.0 if guesses else 1.0)
    assert guessed == [True] + [False] * 11 + [True] + [False] * 11
