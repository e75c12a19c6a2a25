import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lesft.errors import DataError
from lesft_client.data import Sample, wordproblems
from lesft_client.data.samples import Split
from lesft_client.data.stories import ONE_STEP, STORIES, THREE_STEPS, TWO_STEPS

SEEDS = st.integers(min_value=0, max_value=2**63 - 1)
SPLITS: tuple[Split, ...] = ("train", "test")


def question(sample: Sample) -> str:
    return sample.prompt.partition("\n\n")[2]


def other_solution(sample: Sample) -> str:
    return sample.reference.partition("### Standard answer:\n")[2]


def essence(sample: Sample) -> tuple[str, ...]:
    """What is left of a problem when names and things are taken out: its story and its numbers."""
    [title] = [title for title, told in TOLD.items() if told.fullmatch(question(sample))]
    return (title, *re.findall(r"\d+", question(sample)))


TOLD = {
    story.title: re.compile(re.sub(r"\\{\w+\\}", r"[\\w ]+", re.escape(story.question)))
    for story in STORIES
}

OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def worked_out(question: str, solution: str) -> str:
    """The result of a solution's steps, computed from the numbers of the question."""
    known = {Fraction(number) for number in re.findall(r"\d+", question)}
    steps = re.findall(r"(\d+) ([-+*/]) (\d+) =", solution)
    for left, sign, right in steps:
        assert {Fraction(left), Fraction(right)} <= known
        result = OPERATIONS[sign](Fraction(left), Fraction(right))
        known.add(result)
    return str(result)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(SPLITS))
def test_both_solutions_work_out_to_the_answer_and_state_it(seed: int, split: Split) -> None:
    for sample in wordproblems.samples(split, 90, seed):
        for solution in (sample.target, other_solution(sample)):
            assert worked_out(question(sample), solution) == sample.answer
            text, _, final_line = solution.partition("\n")
            assert re.search(rf" = {sample.answer}\b[^=]*$", text)
            assert final_line == f"#### {sample.answer}"


def test_the_two_solutions_use_different_words() -> None:
    for sample in wordproblems.samples("train", 360, 0):
        target, other = (
            set(re.findall("[a-z]+", solution.lower()))
            for solution in (sample.target, other_solution(sample))
        )
        assert len(target & other) / len(target | other) < 0.4, sample


def test_every_text_is_told_to_the_end() -> None:
    for sample in wordproblems.samples("train", 2000, 0):
        assert not re.search(r"[{}]|  |\b1 \w+s\b", sample.prompt + sample.target)
        assert not re.search(r"[{}]|  ", sample.reference)


def test_thousands_of_problems_differ_in_more_than_names() -> None:
    samples = wordproblems.samples("train", 5000, 3)
    assert len({essence(sample) for sample in samples}) == 5000


@settings(max_examples=10, deadline=None)
@given(SEEDS, SEEDS)
def test_no_held_out_problem_is_ever_a_training_problem(seed: int, other: int) -> None:
    train = {essence(sample) for sample in wordproblems.samples("train", 360, seed)}
    test = {essence(sample) for sample in wordproblems.samples("test", 360, other)}
    assert not train & test


def test_every_story_takes_its_turn_with_one_to_three_steps() -> None:
    samples = wordproblems.samples("train", 2 * len(STORIES), 0)
    assert set(Counter(essence(sample)[0] for sample in samples).values()) == {2}
    steps = [sample.target.count(" = ") for sample in samples]
    assert steps == [1, 2, 3] * (len(STORIES) * 2 // 3)
    assert len(ONE_STEP) == len(TWO_STEPS) == len(THREE_STEPS)


@given(SEEDS, st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=10, deadline=None)
def test_asking_for_more_only_adds(seed: int, fewer: int, more: int) -> None:
    fewer, more = sorted((fewer, more))
    longer = wordproblems.samples("train", more, seed)
    assert longer[:fewer] == wordproblems.samples("train", fewer, seed)


def test_the_seed_decides_the_problems() -> None:
    first = wordproblems.samples("train", 36, 0)
    assert first == wordproblems.samples("train", 36, 0)
    assert len(set(first) & set(wordproblems.samples("train", 36, 1))) < 3


def test_a_problem_is_the_same_on_every_machine_and_python() -> None:
    [sample] = wordproblems.samples("test", 1, 0)
    assert sample.answer == "102"
    assert question(sample) == (
        "Kenji has 56 postcards. Peter gives Kenji 46 more. How many postcards does Kenji have now?"
    )


def test_more_problems_than_there_are_is_refused_with_their_number() -> None:
    with pytest.raises(DataError, match=r"can make 11766 different test problems, 20000 were"):
        wordproblems.samples("test", 20_000, 0)


@pytest.mark.parametrize(
    ("solution", "complaint"),
    [
        ("5 + 3 = 9\n#### 9", "is false"),
        ("5 + 4 = 9\n#### 9", "4 comes from nowhere"),
        ("5 + 3 = 8\n#### 9", "states not 9"),
        ("That is 9.\n#### 9", "needs 1 equations"),
        ("5 + 5 = 10\n#### 10", "'3'. of the question is not used"),
    ],
)
def test_a_wrong_solution_would_be_found_out(solution: str, complaint: str) -> None:
    answer = solution.rpartition(" ")[2]
    with pytest.raises(AssertionError, match=complaint):
        wordproblems._verify("Ada has 5 pens and gets 3.", solution, answer, 1)
