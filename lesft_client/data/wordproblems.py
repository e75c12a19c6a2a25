"""A generator of word problems of one to three steps, so that everything runs with no download.

Problems are different when their story or their numbers differ, not only a name. Which of them are
for training and which are held out is fixed by story and numbers, whatever the seed: no test
problem can ever have been trained on, under any names.
"""

import random
import re
from collections.abc import Iterator
from fractions import Fraction
from math import prod

from lesft.errors import DataError
from lesft.seeds import derive_seed
from lesft_client.data.answers import final_answer, with_final_line
from lesft_client.data.order import permutation
from lesft_client.data.prompts import base_prompt, reference_prompt
from lesft_client.data.samples import Sample, Split
from lesft_client.data.stories import PEOPLE, STORIES, Story

_HELD_OUT_ONE_IN = 5
_SMALLEST_RESULT = 2
"""So that every noun in the texts can be in the plural."""

_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
_NUMBER = re.compile(r"\d+")


def samples(split: Split, count: int, seed: int) -> list[Sample]:
    """`count` different problems, the stories in turn; asking for more only adds to the list.

    The target is one worked solution, the reference prompt shows one in other words, and
    the label is the story's title. Raises DataError when there are not so many problems.
    """
    made: list[Sample] = []
    stories = [_problems(story, split, seed) for story in STORIES]
    while stories and len(made) < count:
        for story in list(stories):
            sample = next(story, None)
            if sample is None:
                stories.remove(story)
            else:
                made.append(sample)
    if len(made) < count:
        raise DataError(
            f"wordproblems can make {len(made)} different {split} problems, {count} were asked "
            "for; ask for fewer samples or clients"
        )
    return made[:count]


def _problems(story: Story, split: Split, seed: int) -> Iterator[Sample]:
    """All problems of one story and split, in an order drawn from the seed."""
    combinations = prod(len(values) for values in story.numbers.values())
    for index in permutation(derive_seed(seed, "wordproblems", story.title), combinations):
        numbers = _numbers(story, index)
        if _is_held_out(story, numbers) == (split == "test") and _solve(story, numbers):
            yield _tell(story, numbers, derive_seed(seed, "wordproblems", story.title, index))


def _numbers(story: Story, index: int) -> dict[str, int]:
    """The combination of the story's numbers that has this index."""
    numbers = {}
    for letter, values in story.numbers.items():
        index, place = divmod(index, len(values))
        numbers[letter] = values[place]
    return numbers


def _is_held_out(story: Story, numbers: dict[str, int]) -> bool:
    return derive_seed(0, "held out", story.title, *numbers.values()) % _HELD_OUT_ONE_IN == 0


def _solve(story: Story, numbers: dict[str, int]) -> dict[str, int]:
    """The steps' results by name, or nothing when one is no whole number of at least two."""
    known = dict(numbers)
    results: dict[str, int] = {}
    for number, step in enumerate(story.steps, start=1):
        left, operator, right = step.split()
        value = _apply(known[left], operator, known[right])
        if value.denominator != 1 or value < _SMALLEST_RESULT:
            return {}
        known[f"r{number}"] = results[f"r{number}"] = int(value)
    return results


def _apply(left: int, operator: str, right: int) -> Fraction:
    if operator == "+":
        return Fraction(left + right)
    if operator == "-":
        return Fraction(left - right)
    if operator == "*":
        return Fraction(left * right)
    return Fraction(left, right)


def _tell(story: Story, numbers: dict[str, int], seed: int) -> Sample:
    results = _solve(story, numbers)
    words = {**_cast(story, seed), **{key: str(n) for key, n in {**numbers, **results}.items()}}
    answer = str(results[f"r{len(story.steps)}"])
    question = story.question.format(**words)
    target = with_final_line(story.target.format(**words), answer)
    reference = with_final_line(story.reference.format(**words), answer)
    for solution in (target, reference):
        _verify(question, solution, answer, len(story.steps))
    return Sample(
        prompt=base_prompt(question, "number"),
        target=target,
        reference=reference_prompt(question, reference),
        answer=answer,
        label=story.title,
    )


def _cast(story: Story, seed: int) -> dict[str, str]:
    """Who the story is about, and what it deals with."""
    draw = random.Random(seed).random
    name, he, his = PEOPLE[int(draw() * len(PEOPLE))]
    friends = [person for person, _, _ in PEOPLE if person != name]
    friend = friends[int(draw() * len(friends))]
    first = int(draw() * len(story.things))
    item, items = story.things[first]
    _, others = story.things[first - 1]
    people = {"name": name, "he": he, "He": he.capitalize(), "his": his, "friend": friend}
    return {**people, "item": item, "items": items, "others": others}


def _verify(question: str, solution: str, answer: str, num_steps: int) -> None:
    """Read a solution as a reader would: every equation follows from the question and is true."""
    known = set(_NUMBER.findall(question))
    unused = set(known)
    equations = _EQUATION.findall(solution)
    for left, operator, right, result in equations:
        assert left in known, f"{left} comes from nowhere: {solution}"
        assert right in known, f"{right} comes from nowhere: {solution}"
        assert _apply(int(left), operator, int(right)) == int(result), f"is false: {solution}"
        unused -= {left, right}
        known.add(result)
    assert len(equations) == num_steps, f"needs {num_steps} equations: {solution}"
    assert not unused, f"{unused} of the question is not used: {solution}"
    assert equations[-1][-1] == answer == final_answer(solution), f"states not {answer}: {solution}"
